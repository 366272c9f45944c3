//! Placeholder until the renderers are merged.
use candle_taper::inspect::Inspection;
pub fn table(i: &Inspection) -> String {
    i.tensors
        .iter()
        .map(|t| format!("{} {} {} {:.3} {:?}\n", t.name, t.kind, t.stage, t.bits_per_weight(), t.ideal_bits))
        .collect()
}
pub fn json(_: &Inspection) -> anyhow::Result<String> {
    Ok(String::new())
}
pub fn html(_: &Inspection) -> String {
    String::new()
}
