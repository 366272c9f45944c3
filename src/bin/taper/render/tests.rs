use candle_taper::inspect::{Inspection, Parts, TensorInfo};

use super::*;

const EVIL: &str = "model.layers.3.<script>alert(\"x\")</script>'&.weight";

/// A BF16 tensor coded at about 10.6 bits per weight.
fn coded(name: &str, rows: u64, columns: u64, stage: &str, spread: f64) -> TensorInfo {
    let weights = rows * columns;
    let ideal = if stage == "rans" { 10.55 + spread } else { 10.7 + spread };
    let class_bits = if stage == "rans" { 2.55 + spread } else { 4.0 };
    let tiles = rows.div_ceil(256) * columns.div_ceil(256);
    let parts = Parts {
        plain: 0,
        classes: (weights as f64 * class_bits / 8.0) as u64,
        raw: weights,
        escapes: weights / 1200,
        states: if stage == "rans" { tiles * 512 } else { 0 },
        tables: tiles * 96 + 1024,
        padding: tiles * 31,
    };
    TensorInfo {
        name: name.into(),
        file: "model-00001-of-00002.safetensors".into(),
        shape: vec![rows, columns],
        dtype: "BF16".into(),
        kind: "bf16".into(),
        stage: stage.into(),
        weights,
        original_bytes: 2 * weights,
        stored_bytes: parts.total(),
        ideal_bits: Some(ideal),
        parts,
        predictors: [tiles, 0, 0, 0, 0],
    }
}

/// A tensor that passes through.
fn plain(name: &str, weights: u64) -> TensorInfo {
    let parts = Parts { plain: 2 * weights, ..Parts::default() };
    TensorInfo {
        name: name.into(),
        file: "model-00001-of-00002.safetensors".into(),
        shape: vec![weights],
        dtype: "BF16".into(),
        kind: "-".into(),
        stage: "-".into(),
        weights,
        original_bytes: 2 * weights,
        stored_bytes: 2 * weights,
        ideal_bits: None,
        parts,
        predictors: [0; 5],
    }
}

/// A checkpoint like Llama 3 8B with some layers.
fn llama(layers: u64) -> Inspection {
    let mut tensors = vec![coded("model.embed_tokens.weight", 128_256, 4096, "rans", 0.12)];
    for layer in 0..layers {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
        let wave = 0.06 * (layer as f64 * 0.7).sin();
        for (family, rows, columns, spread) in [
            ("self_attn.q_proj", 4096, 4096, 0.09),
            ("self_attn.k_proj", 1024, 4096, 0.14),
            ("self_attn.v_proj", 1024, 4096, 0.02),
            ("self_attn.o_proj", 4096, 4096, 0.05),
            ("mlp.gate_proj", 14_336, 4096, 0.01),
            ("mlp.up_proj", 14_336, 4096, 0.0),
            ("mlp.down_proj", 4096, 14_336, 0.03),
        ] {
            let stage = if family == "self_attn.v_proj" && layer % 4 == 0 { "fixed12" } else { "rans" };
            tensors.push(coded(&name(family), rows, columns, stage, spread + wave));
        }
        tensors.push(plain(&name("input_layernorm"), 4096));
        tensors.push(plain(&name("post_attention_layernorm"), 4096));
    }
    tensors.push(plain("model.norm.weight", 4096));
    tensors.push(coded("lm_head.weight", 128_256, 4096, "rans", -0.04));
    Inspection { path: "/models/Llama-3-8B-taper".into(), codec: Some("lossless".into()), exact: false, tensors }
}

/// Lines of the first block of columns in the text.
fn tensor_lines(text: &str) -> Vec<&str> {
    text.lines().skip_while(|line| !line.starts_with("name")).take_while(|line| !line.is_empty()).collect()
}

#[test]
fn parts_add_up() {
    let inspection = llama(3);
    let all = totals::Totals::all(&inspection);
    assert_eq!(all.tensors, 30);
    assert_eq!(all.parts.total(), all.stored);
    assert_eq!(PURPOSES.iter().map(|purpose| (purpose.bytes)(&all.parts)).sum::<u64>(), all.stored);
    let groups = totals::by_key(&inspection, coding);
    assert_eq!(groups.iter().map(|(_, group)| group.stored).sum::<u64>(), all.stored);
    assert_eq!(groups.len(), 3);
}

#[test]
fn table_is_aligned_and_narrow() {
    let text = table(&llama(12));
    let lines = tensor_lines(&text);
    assert_eq!(lines.len(), 1 + 3 + 12 * 9);
    let width = lines[0].chars().count();
    assert!(width <= 120, "{width}");
    assert!(lines.iter().all(|line| line.chars().count() == width));
    let arrow = lines[1].chars().position(|c| c == '>');
    assert!(lines[1..].iter().all(|line| line.chars().position(|c| c == '>') == arrow));
    assert!(text.contains("attn.q_proj"));
    assert!(!text.contains("predictors"));
}

#[test]
fn long_names_lose_their_middle() {
    let mut inspection = llama(1);
    inspection.tensors[0].name = format!("first.{}.last.weight", "middle.".repeat(40));
    let text = table(&inspection);
    let line = tensor_lines(&text)[1];
    assert!(line.starts_with("first.") && line.contains('…') && line.contains("last "), "{line}");
    assert!(line.chars().count() <= 120);
}

#[test]
fn predictors_are_named() {
    let mut inspection = llama(1);
    inspection.tensors[0].predictors = [1, 0, 3, 0, 0];
    assert!(table(&inspection).contains("up 3 tiles"));
    assert!(html(&inspection).contains("Predictors, by tiles"));
}

#[test]
fn names_are_escaped() {
    let mut inspection = llama(2);
    inspection.tensors[1].name = EVIL.into();
    inspection.tensors[2].dtype = "\"<b>".into();
    inspection.path = "/tmp/<script>alert(1)</script>".into();
    inspection.codec = Some("<i>'\"".into());
    let page = html(&inspection);
    assert_eq!(page.matches("<script").count(), 1);
    assert!(!page.contains("alert(\"") && !page.contains("<b>\"") && !page.contains("<i>'"));
    assert!(page.contains("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&#39;&amp;"));
    let text = table(&Inspection { path: "a\u{1b}[31m\nb".into(), ..Inspection::default() });
    assert!(!text.contains('\u{1b}') && text.contains("a\u{fffd}[31m\u{fffd}b"));
}

#[test]
fn empty_inspection_is_fine() {
    let mut one = Inspection::default();
    one.tensors.push(TensorInfo { kind: "bf16".into(), ideal_bits: Some(f64::NAN), ..TensorInfo::default() });
    for inspection in [Inspection::default(), one] {
        for text in [table(&inspection), html(&inspection), json(&inspection).unwrap()] {
            assert!(!text.contains("NaN") && !text.contains("inf%"), "{text}");
        }
    }
}

#[test]
fn json_parses_back() {
    let inspection = llama(3);
    let value: serde_json::Value = serde_json::from_str(&json(&inspection).unwrap()).unwrap();
    let tensor = &value["tensors"][10];
    assert_eq!(tensor["name"], "model.layers.1.self_attn.q_proj.weight");
    assert_eq!((&tensor["layer"], &tensor["family"]), (&1.into(), &"self_attn.q_proj".into()));
    assert!((tensor["bits_per_weight"].as_f64().unwrap() - inspection.tensors[10].bits_per_weight()).abs() < 1e-9);
    assert_eq!(value["totals"]["tensors"], 30);
    let groups = value["totals"]["by_coding"].as_object().unwrap();
    let sum: u64 = groups.values().map(|group| group["stored_bytes"].as_u64().unwrap()).sum();
    assert_eq!(value["totals"]["stored_bytes"], sum);
    assert!(value["tensors"][0]["layer"].is_null());
}

#[test]
fn charts_stay_bounded() {
    let page = html(&llama(1200));
    assert!(page.matches("<title>layer ").count() <= 200);
    assert!(page.contains("layer 0–5: "));
    let mut experts = llama(1);
    experts.tensors.extend((0..99).map(|i| coded(&format!("model.layers.0.f{i}.weight"), 256, 256, "rans", 0.0)));
    assert!(html(&experts).matches("class=\"family\"").count() <= 24);
    let merged = coded("model.layers.0.mlp.experts.7.up_proj.weight", 1, 1, "rans", 0.0);
    assert_eq!(family(&merged), "mlp.experts.*.up_proj");
}

#[test]
fn sizes_and_shares() {
    for (bytes, text) in
        [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1 << 20, "1.00 MiB"), (112 << 20, "112 MiB")]
    {
        assert_eq!(size(bytes), text);
    }
    assert!(size(u64::MAX).len() <= 8 && size((1 << 30) - 1).len() <= 8);
    assert_eq!((share(1, 0), share(0, 0)), ("100.0%".into(), "0%".into()));
    assert_eq!((count(1_234_567), count(12)), ("1,234,567".into(), "12".into()));
}

/// Writes pages to look at: `TAPER_PAGES=/tmp cargo test --bin taper -- --ignored pages`.
#[test]
#[ignore = "writes files"]
fn pages() {
    let Ok(folder) = std::env::var("TAPER_PAGES") else { return };
    let mut big = llama(200);
    big.tensors.extend((0..8197).map(|i| {
        coded(&format!("model.layers.{}.mlp.experts.{}.up_proj.weight", i % 200, i / 200), 768, 2048, "rans", 0.0)
    }));
    for (name, inspection) in [("page", llama(32)), ("big", big), ("empty", Inspection::default())] {
        std::fs::write(format!("{folder}/{name}.html"), html(&inspection)).unwrap();
        std::fs::write(format!("{folder}/{name}.txt"), table(&inspection)).unwrap();
    }
}
