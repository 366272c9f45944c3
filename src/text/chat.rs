//! Chat templates: a conversation as the prompt that a model was trained on.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error as TemplateError, ErrorKind, Value as Jinja, context};
use regex::{Captures, Regex};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::Formatter;

use super::tokenizer::token_text;
use crate::{Error, Result};

/// Steps that a template may take: a limit for malicious ones.
const FUEL: u64 = 50_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.to_string(), content: content.into() }
    }
}

/// A model's chat template, in Jinja as transformers runs it.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    /// Texts of special tokens that templates use.
    tokens: Vec<(&'static str, String)>,
}

impl ChatTemplate {
    /// The template of a directory: `chat_template.jinja`, or else the `chat_template` of `tokenizer_config.json`, whose
    /// content is `settings` (of several the one named `default`).
    pub(super) fn read(dir: &Path, settings: &Value) -> Result<Option<ChatTemplate>> {
        let path = dir.join("chat_template.jinja");
        let source = match fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let template = &settings["chat_template"];
                let named = template.as_array().and_then(|all| all.iter().find(|one| one["name"] == "default"));
                named.map_or(template, |one| &one["template"]).as_str().map(str::to_string)
            }
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let tokens = names.iter().filter_map(|&name| Some((name, token_text(settings, name)?.to_string())));
        Ok(source.map(|source| ChatTemplate::new(&source, tokens.collect())))
    }

    /// A template from its text; `tokens` are the texts of special tokens by name, such as `bos_token`.
    pub fn new(source: &str, tokens: Vec<(&'static str, String)>) -> ChatTemplate {
        // Answers are marked for training by blocks that Jinja itself does not know.
        static MARK: LazyLock<Option<Regex>> =
            LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").ok());
        let unmarked = |found: &Captures<'_>| match found.get(2) {
            None => format!("{{%{} if true {}%}}", &found[1], &found[3]),
            Some(_) => format!("{{%{} endif {}%}}", &found[1], &found[3]),
        };
        let source = MARK.as_ref().map_or(source.into(), |mark| mark.replace_all(source, unmarked)).into_owned();
        ChatTemplate { source, tokens }
    }

    /// The conversation as a prompt that ends where the assistant's answer begins.
    ///
    /// # Errors
    /// If the template is malformed, or refuses the conversation, as some do with a system message.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let fail = |error: TemplateError| match error.detail().filter(|_| error.kind() == ErrorKind::InvalidOperation) {
            Some(detail) => Error::Invalid(format!("the model's chat template refuses the conversation: {detail}")),
            None => Error::Unsupported(format!("the model's chat template cannot be run: {error}")),
        };
        let env = environment().map_err(fail)?;
        let tokens = Jinja::from_pairs(self.tokens.iter().map(|(name, text)| (*name, text.as_str())));
        let turn = |m: &Message| Jinja::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        let messages: Vec<Jinja> = messages.iter().map(turn).collect();
        let values = context! {
            messages, add_generation_prompt => true, tools => (), documents => (), ..tokens
        };
        env.template_from_str(&self.source).and_then(|template| template.render(values)).map_err(fail)
    }
}

/// Jinja with what transformers adds to it.
fn environment<'a>() -> std::result::Result<Environment<'a>, TemplateError> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_fuel(Some(FUEL));
    env.add_function("raise_exception", |text: String| -> std::result::Result<String, TemplateError> {
        Err(TemplateError::new(ErrorKind::InvalidOperation, text))
    });
    env.add_function("strftime_now", |format: String| {
        jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
            .map_err(|error| TemplateError::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    env.add_filter("tojson", |value: Jinja, options: Kwargs| -> std::result::Result<String, TemplateError> {
        let indent: Option<usize> = options.get("indent")?;
        to_json(&value, indent).map_err(|e| TemplateError::new(ErrorKind::BadSerialization, e.to_string()))
    });
    Ok(env)
}

/// JSON as Python's `json.dumps` writes it.
fn to_json(value: &Jinja, indent: Option<usize>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, OneLine))?,
        Some(width) => {
            let indent = " ".repeat(width.min(64));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A space after each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the templates of models use, in one.
    const TEMPLATE: &str = r#"{#- what models' templates do -#}
{%- set ns = namespace(system='', turns=0) %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set talk = messages[1:] %}
{%- else %}
    {%- set talk = messages %}
{%- endif %}
{{- bos_token }}
{%- if tools is none and not documents %}no tools
{% endif %}
{% for m in talk if m.role != 'tool' %}
    {% if loop.index0 % 2 != (m.role == 'assistant') | int %}
{{ raise_exception('turns must alternate, found ' + m.role) }}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
<|{{ m.role }}|>
{% generation %}
{{ m['content'].split('</think>')[-1].lstrip('\n').replace('a', 'A') }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}

{% endgeneration %}
    {% if loop.index >= 3 %}{% break %}{% endif %}
{% endfor %}
{{ ns.turns }} {{ ns.system | upper }} {{ {'k': [1, none, 'é<b>'], "q": true} | tojson }}
{{ [1, {"a": 2}] | tojson(indent=2) }}
{{ strftime_now('%Y') | length }} {{ 'x' if 'sys' in ns.system else 'y' }} {{ messages | length }} {{ messages[-1].content.startswith('by') }}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"#;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, vec![("bos_token", "<s>".into()), ("eos_token", "</s>".into())]).render(messages)
    }

    fn talk() -> Vec<Message> {
        let turns = [
            ("system", " sysé "),
            ("user", "a cat"),
            ("assistant", "<think>x</think>\n\nAh"),
            ("user", "bye"),
            ("assistant", "never said"),
        ];
        turns.map(|(role, content)| Message::new(role, content)).to_vec()
    }

    /// The text is what Python's Jinja renders with transformers' settings.
    #[test]
    fn templates_render_as_in_python() {
        let expected = r#"<s>no tools
<|user|>
A cAt
<|assistant|>
Ah</s>
<|user|>
bye
3 SYSÉ {"k": [1, null, "é<b>"], "q": true}
[
  1,
  {
    "a": 2
  }
]
4 x 4 True
<|assistant|>
"#;
        assert_eq!(render(TEMPLATE, &talk()[..4]).unwrap(), expected);
        let expected = expected.replace("SYSÉ", "").replace("4 x 4", "4 y 3");
        assert_eq!(render(TEMPLATE, &talk()[1..4]).unwrap(), expected);
    }

    #[test]
    fn bad_templates_and_refusals_are_told_apart() {
        let refused = render(TEMPLATE, &talk()[2..]).unwrap_err().to_string();
        assert!(refused.contains("refuses the conversation: turns must alternate, found assistant"), "{refused}");
        for (source, part) in [
            ("{% for %}", "syntax error"),
            ("{{ nothing() }}", "unknown function"),
            ("{{ messages.foo() }}", "unknown method"),
            ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ] {
            let error = render(source, &talk()).unwrap_err().to_string();
            assert!(error.contains("cannot be run") && error.contains(part), "{error}");
        }
    }
}
