//! `taper inspect --json`.

use candle_taper::inspect::{Inspection, TensorInfo};
use serde_json::{Map, Value, json};

use super::coding;
use super::totals::{Totals, by_key};

/// The inspection as pretty JSON, with computed fields in each tensor and a `totals` object.
pub fn json(inspection: &Inspection) -> anyhow::Result<String> {
    let tensors = inspection.tensors.iter().map(tensor).collect::<anyhow::Result<Vec<_>>>()?;
    let head = Inspection {
        path: inspection.path.clone(),
        codec: inspection.codec.clone(),
        exact: inspection.exact,
        tensors: Vec::new(),
    };
    let mut value = serde_json::to_value(head)?;
    value["tensors"] = Value::Array(tensors);
    value["totals"] = all(inspection);
    Ok(serde_json::to_string_pretty(&value)?)
}

/// One tensor with its computed fields.
fn tensor(info: &TensorInfo) -> anyhow::Result<Value> {
    let totals = Totals::of(info);
    let mut value = serde_json::to_value(info)?;
    value["bits_per_weight"] = json!(totals.bits());
    value["overhead_percent"] = json!(totals.overhead());
    value["layer"] = json!(info.layer());
    value["family"] = json!(info.family());
    Ok(value)
}

/// Sums over everything and by coding.
fn all(inspection: &Inspection) -> Value {
    let mut value = sums(&Totals::all(inspection));
    let groups = by_key(inspection, coding);
    value["by_coding"] = groups.iter().map(|(name, totals)| (name.clone(), sums(totals))).collect::<Map<_, _>>().into();
    value
}

/// One set of sums.
fn sums(totals: &Totals) -> Value {
    json!({
        "tensors": totals.tensors,
        "weights": totals.weights,
        "original_bytes": totals.original,
        "stored_bytes": totals.stored,
        "percent": totals.percent(),
        "bits_per_weight": totals.bits(),
        "ideal_bits": totals.ideal(),
        "overhead_percent": totals.overhead(),
        "parts": totals.parts,
        "predictors": totals.predictors,
    })
}
