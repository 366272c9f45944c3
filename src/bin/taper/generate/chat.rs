//! `taper generate --chat`: a conversation through the model's chat template.

use std::io::{BufRead, IsTerminal};
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_taper::text::{ChatTemplate, Generator, Message, ModelTokenizer};

use super::{Notes, print, prompt, write};
use crate::args::GenerateArgs;

/// One answer to the message that was given, or at a terminal one after another.
pub fn run(
    args: &GenerateArgs,
    dir: &Path,
    tokenizer: &ModelTokenizer,
    generator: &mut Generator<'_>,
    note: Notes,
) -> Result<()> {
    let template = tokenizer.chat_template().with_context(|| {
        format!(
            "{} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): the model was not \
             trained to chat; leave out --chat",
            dir.display()
        )
    })?;
    let mut talk: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    let given = args.prompt.is_some() || args.file.is_some() || !std::io::stdin().is_terminal();
    if given {
        let message = prompt(args)?.context("there is no message: pass --prompt TEXT, or pipe one in")?;
        return answer(args, template, tokenizer, generator, note, &mut talk, message);
    }
    note.say(format_args!("a message on each line; Ctrl-D ends the conversation"));
    while let Some(message) = line()? {
        if !message.trim().is_empty() {
            answer(args, template, tokenizer, generator, note, &mut talk, message)?;
        }
    }
    print("\n")
}

/// A line from the terminal.
fn line() -> Result<Option<String>> {
    print("> ")?;
    let mut text = String::new();
    let read = std::io::stdin().lock().read_line(&mut text).context("cannot read from the terminal")?;
    Ok((read > 0).then(|| text.trim_end_matches(['\n', '\r']).to_string()))
}

/// Adds a message and the model's answer to the conversation.
fn answer(
    args: &GenerateArgs,
    template: &ChatTemplate,
    tokenizer: &ModelTokenizer,
    generator: &mut Generator<'_>,
    note: Notes,
    talk: &mut Vec<Message>,
    message: String,
) -> Result<()> {
    talk.push(Message::new("user", message));
    let tokens = loop {
        let tokens = tokenizer.encode_chat(&template.render(talk)?)?;
        if tokens.len() < generator.context() {
            break tokens;
        }
        forget(talk, tokens.len(), generator.context())?;
        note.say(format_args!("note: the conversation has outgrown the model's context; its oldest turn is forgotten"));
    };
    let text = write(args, tokenizer, generator, &tokens)?;
    print("\n")?;
    talk.push(Message::new("assistant", text));
    note.stats(generator.stats());
    Ok(())
}

/// Forgets the oldest message of the user and the answer to it. What the system says stays.
fn forget(talk: &mut Vec<Message>, tokens: usize, context: usize) -> Result<()> {
    let first = usize::from(talk.first().is_some_and(|message| message.role == "system"));
    if talk.len() < first + 3 {
        bail!("the message has {tokens} tokens with all that the chat template adds, the model's context is {context}");
    }
    talk.drain(first..first + 2);
    Ok(())
}
