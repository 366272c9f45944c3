//! Whole models: a prompt is read (`pp`), tokens are generated (`tg`).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use candle_taper::Checkpoint;
use serde_json::{Value, json};

use super::args::{BenchArgs, Stock};
use super::load::{How, Loaded, Plan};
use super::progress::Steps;
use super::report::{Group, Load, Row};
use super::timing::in_turns;
use crate::generate::peak_memory;

/// Codings and formats that are timed unless others are asked for.
const CODINGS: [&str; 3] = ["fixed12", "rans", "int8-fixed12"];
const STOCKS: [&str; 2] = ["bf16", "f32"];
/// Rounds unless asked for.
const ROUNDS: u32 = 3;
/// Tokens that a probe generates.
const PROBE_TOKENS: usize = 4;

/// The models that the arguments ask for, ours first.
fn plans(args: &BenchArgs) -> Result<Vec<Plan>> {
    let (mut compressed, mut plain): (Vec<&Path>, Vec<&Path>) = Default::default();
    let (files, dirs): (Vec<&Path>, Vec<&Path>) =
        args.model.iter().map(PathBuf::as_path).partition(|path| path.is_file());
    for dir in dirs {
        let list = if Checkpoint::open(dir)?.is_compressed() { &mut compressed } else { &mut plain };
        list.push(dir);
    }
    let dir_name = |dir: &Path| dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned();
    let plan = |dir: &Path, what: String, how: How| {
        let name = if plain.len() > 1 { format!("{} {what}", dir_name(dir)) } else { what };
        Plan { name, dir: dir.to_path_buf(), how }
    };
    let mut plans: Vec<Plan> = Vec::new();
    for dir in &compressed {
        // The coding is for what is not compressed in there.
        let coding = "rans".parse().map_err(anyhow::Error::msg)?;
        plans.push(Plan { name: dir_name(dir), dir: dir.to_path_buf(), how: How::Compressed(coding) });
    }
    if compressed.is_empty() || !args.codec.is_empty() {
        for dir in &plain {
            let codings = args.codings(&CODINGS);
            if let Some(coding) = codings.iter().find(|coding| coding.blocks.is_some()) {
                bail!("--codec {} is for layers; a model in a GGUF file is passed with --model", coding.name)
            }
            plans.extend(codings.into_iter().map(|c| plan(dir, c.name.clone(), How::ours(c))));
        }
    }
    // candle cannot read compressed weights: it gets them decoded if there are no others.
    let sources = if plain.is_empty() { &compressed[..1.min(compressed.len())] } else { &plain[..] };
    for dir in sources {
        for stock in args.stocks(&STOCKS) {
            let Stock::Float(dtype) = stock else {
                bail!("--stock {stock}: models are compared with candle's bf16, f16 and f32")
            };
            plans.push(plan(dir, stock.to_string(), How::Stock(dtype)));
        }
    }
    for file in files {
        let (name, dir) = (dir_name(file), file.to_path_buf());
        plans.push(Plan { name: name.clone(), dir: dir.clone(), how: How::Gguf });
        if !args.stocks(&STOCKS).is_empty() {
            plans.push(Plan { name, dir, how: How::StockGguf });
        }
    }
    ensure!(!plans.is_empty(), "there is nothing to time: --codec and --stock are none");
    Ok(plans)
}

/// Times all models of the arguments.
pub fn run(args: &BenchArgs, device: &Device, steps: &Steps) -> Result<(Vec<Load>, Vec<Group>)> {
    ensure!(args.n_prompt > 0 || args.n_gen > 0, "there is nothing to time: -p and -n are 0");
    ensure!(args.max_time > 0.0, "--max-time must be above 0");
    let plans = plans(args)?;
    let rounds = args.repetitions.unwrap_or(ROUNDS) as usize;
    let tests = usize::from(args.n_prompt > 0) + usize::from(args.n_gen > 0);
    let ours = if args.on_gpu() && args.n_gen > 0 && !args.no_cuda_graph {
        (0..plans.len()).filter(|&plan| !plans[plan].stock()).collect()
    } else {
        Vec::new()
    };
    steps.expect((plans.len() * (2 + tests * rounds) + ours.len() * rounds) as u64);
    let mut loads = Vec::new();
    for plan in &plans {
        steps.begin(&format!("{}: loading in a new process", plan.label()));
        loads.push(probe(args, plan)?);
        steps.step();
    }
    let mut models = Vec::new();
    for plan in &plans {
        steps.begin(&format!("{}: loading", plan.label()));
        let mut model = plan.load(args.activations(), device, args.layout[0])?;
        let needed = args.n_prompt.max(args.n_gen);
        let context = model.config().max_position_embeddings;
        ensure!(needed <= context, "{}: {needed} tokens are beyond the context of {context}", plan.dir.display());
        model.set_cuda_graph(!args.no_cuda_graph);
        // Checks the checksums of all tiles, as the first use does.
        generate(&mut model, 1, args.max_time)?;
        models.push(model);
        steps.step();
    }
    let all: Vec<usize> = (0..plans.len()).collect();
    let mut groups = Vec::new();
    if args.n_prompt > 0 {
        let title = format!("pp{}: a prompt of {} tokens", args.n_prompt, args.n_prompt);
        let time = |model: &mut Loaded| read(model, args.n_prompt);
        groups.push(group((title, args.n_prompt, args.n_prompt), &plans, (&mut models, &all), rounds, steps, time)?);
    }
    if args.n_gen > 0 {
        let title = format!("tg{}: {} tokens generated one by one", args.n_gen, args.n_gen);
        let time = |model: &mut Loaded| generate(model, args.n_gen, args.max_time);
        groups.push(group((title, args.n_gen, 1), &plans, (&mut models, &all), rounds, steps, time)?);
        if !ours.is_empty() {
            models.iter_mut().for_each(|model| model.set_cuda_graph(false));
            let title = format!("tg{}, every kernel launched by itself instead of a CUDA graph", args.n_gen);
            groups.push(group((title, args.n_gen, 1), &plans, (&mut models, &ours), rounds, steps, time)?);
        }
    }
    Ok((loads, groups))
}

/// Times one test of some of the models; `test` is its title, its tokens, and how many of them a pass over the weights serves.
fn group(
    test: (String, usize, usize),
    plans: &[Plan],
    (models, some): (&mut [Loaded], &[usize]),
    rounds: usize,
    steps: &Steps,
    time: impl Fn(&mut Loaded) -> Result<f64>,
) -> Result<Group> {
    let (title, tokens, samples_a_pass) = test;
    let samples = in_turns(some.len(), rounds, |place, round| {
        let model = some[place];
        steps.begin(&format!("{title}: {}, round {} of {rounds}", plans[model].label(), round + 1));
        let time = time(&mut models[model]).with_context(|| plans[model].label())?;
        steps.step();
        Ok(time)
    })?;
    let chosen = some.iter().map(|&model| (&plans[model], &models[model]));
    let rows = chosen.zip(samples).map(|((plan, model), samples)| Row {
        name: plan.name.clone(),
        stock: plan.stock(),
        bytes: model.bytes,
        weights: model.weights,
        moved: None,
        samples,
    });
    Ok(Group { title, tokens: Some(tokens), samples_a_pass, rows: rows.collect(), plot: None })
}

/// Token ids that look random; times depend on how many there are only.
fn ids(count: usize, vocab: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab.max(1) as u32).collect()
}

/// Seconds a token that a prompt takes. As everywhere only the last position's logits are computed.
fn read(model: &mut Loaded, tokens: usize) -> Result<f64> {
    let input = Tensor::new(ids(tokens, model.config().vocab_size), model.device())?.unsqueeze(0)?;
    model.reset()?;
    let start = Instant::now();
    model.forward(&input, 0)?;
    Ok(start.elapsed().as_secs_f64() / tokens as f64)
}

/// Seconds a token that is generated after an empty context takes, without choosing it.
fn generate(model: &mut Loaded, tokens: usize, max_time: f64) -> Result<f64> {
    model.reset()?;
    let start = Instant::now();
    for (position, id) in ids(tokens, model.config().vocab_size).into_iter().enumerate() {
        let input = Tensor::new(&[[id]], model.device())?;
        model.forward(&input, position)?;
        let time = start.elapsed().as_secs_f64();
        if time > max_time || position + 1 == tokens {
            return Ok(time / (position + 1) as f64);
        }
    }
    Ok(0.0)
}

/// Loads a model in a new process, whose memory is its own.
fn probe(args: &BenchArgs, plan: &Plan) -> Result<Load> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
    command.args(["bench", "--quiet", "--model"]).arg(&plan.dir).args(["--probe", &plan.code()]);
    command.args(["--dtype", DType::as_str(&args.activations())]).args(["-p", &args.n_prompt.to_string()]);
    command.args(["--device", &args.device.to_string(), "--layout", args.layout[0].name()]);
    if args.no_cuda_graph {
        command.arg("--no-cuda-graph");
    }
    let output = command.stdin(Stdio::null()).stderr(Stdio::piped()).output().context("cannot start this program")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "loading {} in a new process failed: {}", plan.label(), error.trim());
    let value: Value = serde_json::from_slice(&output.stdout).context("a new process answered nonsense")?;
    Ok(Load {
        name: plan.name.clone(),
        stock: plan.stock(),
        seconds: value["load_s"].as_f64().unwrap_or(0.0),
        peak: value["peak_bytes"].as_u64(),
        loading: value["load_peak_bytes"].as_u64(),
        bytes: value["bytes"].as_u64().unwrap_or(0),
        weights: value["weights"].as_u64().unwrap_or(0),
    })
}

/// What the new process does: loads one model, reads a prompt, generates some tokens, and tells what that took.
pub fn run_probe(args: &BenchArgs, code: &str, device: &Device) -> Result<String> {
    let dir = args.model.first().context("--probe needs --model")?;
    let start = Instant::now();
    let mut model = Plan::new(dir, code)?.load(args.activations(), device, args.layout[0])?;
    model.set_cuda_graph(!args.no_cuda_graph);
    device.synchronize()?;
    let (seconds, loading) = (start.elapsed().as_secs_f64(), gpu_peak(device));
    if args.n_prompt > 0 {
        read(&mut model, args.n_prompt)?;
    }
    let tokens = PROBE_TOKENS.min(model.config().max_position_embeddings);
    generate(&mut model, tokens, args.max_time)?;
    let peak = if device.is_cuda() { gpu_peak(device) } else { peak_memory() };
    let (bytes, weights) = (model.bytes, model.weights);
    Ok(json!({"load_s": seconds, "load_peak_bytes": loading, "peak_bytes": peak, "bytes": bytes, "weights": weights})
        .to_string())
}

/// Bytes of a GPU's memory that this process took at most; what the driver and cuBLAS hold for themselves does not count.
fn gpu_peak(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return candle_taper::cuda::MemoryUse::of(device).ok().map(|memory| memory.peak);
    }
    let _ = device;
    None
}
