//! candle layers over compressed weights, against candle's own.
#![cfg(feature = "candle")]

mod common;

use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_nn::{Embedding, Linear, VarBuilder};
use candle_taper::nn::{CompressedEmbedding, CompressedLinear, LinearLayer};
use candle_taper::ops::compressed_linears;
use candle_taper::{Checkpoint, Codec, Options, Stage, convert};

const STAGES: [Stage; 3] = [Stage::Rans, Stage::Fixed12, Stage::Fixed11];

fn lossless(stage: Stage) -> Options {
    Options { stage, ..Options::default() }
}

fn random(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::randn(0.0f32, 0.5, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Largest difference, relative to the largest magnitude.
fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let largest = b.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? / largest.max(1e-6))
}

#[test]
fn linear_layers_equal_candles_in_any_dtype_and_shape() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        for stage in STAGES {
            let weight = random(&[300, 200], DType::BF16)?;
            let bias = random(&[300], DType::F32)?;
            let layer = CompressedLinear::from_tensor(&weight, Some(bias.clone()), &lossless(stage))?;
            let dense = Linear::new(weight.to_dtype(DType::F32)?, Some(bias));
            for shape in [&[200][..], &[1, 200], &[7, 200], &[2, 3, 200], &[0, 200]] {
                let x = random(shape, dtype)?;
                let y = layer.forward(&x)?;
                assert_eq!((y.dims(), y.dtype()), (&[&shape[..shape.len() - 1], &[300]].concat()[..], dtype));
                if x.elem_count() > 0 {
                    let flat = x.to_dtype(DType::F32)?.reshape(((), 200))?;
                    let expected = dense.forward(&flat)?.reshape(y.dims())?;
                    assert!(difference(&y, &expected)? < tolerance, "{dtype:?} {stage:?} {shape:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn layers_come_out_of_a_var_builder_as_candles_do() -> Result<()> {
    let tensors = [
        ("a.weight", random(&[40, 30], DType::F32)?),
        ("a.bias", random(&[40], DType::F32)?),
        ("b.weight", random(&[40, 30], DType::F32)?),
    ];
    let tensors = tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let x = random(&[3, 30], DType::F32)?;
    for (name, bias) in [("a", true), ("b", false)] {
        let ours = CompressedLinear::from_var_builder(30, 40, &Options::default(), vb.pp(name))?;
        let theirs = candle_nn::linear_b(30, 40, bias, vb.pp(name))?;
        assert_eq!(ours.bias().is_some(), bias);
        assert!(difference(&ours.forward(&x)?, &theirs.forward(&x)?)? < 1e-5);
    }
    let wrong = CompressedLinear::from_var_builder(31, 40, &Options::default(), vb.pp("a")).unwrap_err().to_string();
    assert!(wrong.contains("[40, 31]") && wrong.contains("[40, 30]"), "{wrong}");
    Ok(())
}

#[test]
fn strided_and_offset_inputs_are_taken_as_they_are() -> Result<()> {
    let layer = CompressedLinear::from_tensor(&random(&[64, 96], DType::F32)?, None, &Options::default())?;
    let base = random(&[96, 10], DType::F32)?;
    for x in [base.t()?, base.t()?.narrow(0, 3, 4)?, random(&[5, 200], DType::F32)?.narrow(1, 50, 96)?] {
        assert!(!x.is_contiguous());
        let (strided, copied) = (layer.forward(&x)?, layer.forward(&x.contiguous()?)?);
        assert_eq!(strided.to_vec2::<f32>()?, copied.to_vec2::<f32>()?);
    }
    Ok(())
}

#[test]
fn gradients_equal_candles() -> Result<()> {
    let weight = random(&[130, 270], DType::F32)?;
    let layer = CompressedLinear::from_tensor(&weight, None, &Options::default())?;
    let x = Var::from_tensor(&random(&[3, 4, 270], DType::F32)?)?;
    let scale = random(&[130], DType::F32)?;
    let ours = layer.forward(&x)?.broadcast_mul(&scale)?.sqr()?.sum_all()?.backward()?;
    let theirs = x.broadcast_matmul(&weight.t()?)?.broadcast_mul(&scale)?.sqr()?.sum_all()?.backward()?;
    let (ours, theirs) = (ours.get(&x).unwrap(), theirs.get(&x).unwrap());
    assert!(difference(ours, theirs)? < 1e-5);
    Ok(())
}

/// Q, K and V of different heights, stages and codecs.
fn three_layers() -> Result<[CompressedLinear; 3]> {
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    let q = CompressedLinear::from_tensor(&random(&[130, 270], DType::BF16)?, None, &lossless(Stage::Rans))?;
    let k = random(&[33, 270], DType::F32)?;
    let k = CompressedLinear::from_tensor(&k, Some(random(&[33], DType::F32)?), &lossless(Stage::Fixed12))?;
    Ok([q, k, CompressedLinear::from_tensor(&random(&[70, 270], DType::F32)?, None, &int8)?])
}

#[test]
fn merged_products_equal_separate_ones_to_the_last_bit() -> Result<()> {
    let [q, k, v] = three_layers()?;
    let base = random(&[9, 300], DType::F32)?;
    let strided = base.narrow(1, 7, 270)?;
    for x in [strided.i(4..5)?, strided.clone(), base.flatten_all()?.narrow(0, 5, 540)?.reshape((1, 2, 270))?] {
        for x in [x.clone(), x.to_dtype(DType::BF16)?, x.to_dtype(DType::F16)?, x.narrow(0, 0, 0)?] {
            let merged = CompressedLinear::forward_each([&q, &k, &v], &x)?;
            for (merged, layer) in merged.iter().zip([&q, &k, &v]) {
                let alone = layer.forward(&x)?;
                assert_eq!((merged.dims(), merged.dtype()), (alone.dims(), alone.dtype()));
                let bits = |t: &Tensor| -> Result<Vec<u32>> {
                    let values = t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                    Ok(values.into_iter().map(f32::to_bits).collect())
                };
                assert_eq!(bits(merged)?, bits(&alone)?, "{x:?}");
            }
        }
    }
    assert!(compressed_linears(&base, &[])?.is_empty());
    let other = CompressedLinear::from_tensor(&random(&[64, 300], DType::F32)?, None, &Options::default())?;
    for layers in [[&other, &q], [&q, &other]] {
        let error = CompressedLinear::forward_each(layers, &base.narrow(1, 0, 270)?).unwrap_err().to_string();
        assert!(error.contains("[9, 270]") && error.contains("[64, 300]"), "{error}");
    }
    Ok(())
}

#[test]
fn gradients_of_merged_products_add_up() -> Result<()> {
    let layers = three_layers()?;
    let [q, k, v] = &layers;
    let x = Var::from_tensor(&random(&[2, 3, 270], DType::F32)?)?;
    let scale = [130, 33, 70].map(|n| random(&[n], DType::F32).unwrap());
    let loss = |parts: [Tensor; 3]| -> Result<Tensor> {
        let terms = parts.iter().zip(&scale).map(|(y, scale)| y.broadcast_mul(scale)?.sqr()?.sum_all());
        Tensor::stack(&terms.collect::<Result<Vec<_>>>()?, 0)?.sum_all()
    };
    let merged = loss(CompressedLinear::forward_each([q, k, v], &x)?)?.backward()?;
    let apart = loss([q.forward(&x)?, k.forward(&x)?, v.forward(&x)?])?.backward()?;
    assert!(difference(merged.get(&x).unwrap(), apart.get(&x).unwrap())? < 1e-6);
    Ok(())
}

#[test]
fn layers_convert_and_tell_their_size() -> Result<()> {
    let linear = Linear::new(random(&[256, 512], DType::BF16)?, None);
    let layer = CompressedLinear::from_linear(&linear, &Options::default())?;
    let back = layer.to_dense()?;
    let bits = |t: &Tensor| t.flatten_all()?.to_vec1::<half::bf16>();
    assert_eq!(bits(linear.weight())?, bits(back.weight())?);
    let (now, before) = layer.size();
    assert!(before == 2 * 256 * 512 && now < before * 7 / 10, "{now} {before}");
    let error = layer.forward(&random(&[3, 511], DType::F32)?).unwrap_err().to_string();
    assert!(error.contains("[3, 511]") && error.contains("[256, 512]"), "{error}");
    assert!(layer.forward(&Tensor::zeros((1, 512), DType::U32, &Device::Cpu)?).is_err());
    assert!(CompressedLinear::from_tensor(&random(&[5], DType::F32)?, None, &Options::default()).is_err());
    Ok(())
}

#[test]
fn embeddings_equal_candles_and_share_their_table() -> Result<()> {
    let table = random(&[300, 96], DType::BF16)?;
    let (dense, packed) =
        (Embedding::new(table.clone(), 96), CompressedEmbedding::from_tensor(&table, &Options::default())?);
    let ids = Tensor::new(&[[0u32, 299, 64], [63, 5, 5]], &Device::Cpu)?;
    let (a, b) = (dense.forward(&ids)?, packed.forward(&ids)?);
    assert_eq!(b.dims(), [2, 3, 96]);
    assert_eq!(a.i((1, 2))?.to_vec1::<half::bf16>()?, b.i((1, 2))?.to_vec1::<half::bf16>()?);
    assert_eq!(difference(&a, &b)?, 0.0);
    let x = random(&[2, 96], DType::F32)?;
    let head = packed.as_linear().forward(&x)?;
    assert!(difference(&head, &x.matmul(&table.to_dtype(DType::F32)?.t()?)?)? < 1e-5);
    let error = packed.forward(&Tensor::new(&[300u32], &Device::Cpu)?).unwrap_err().to_string();
    assert!(error.contains("300"), "{error}");
    Ok(())
}

#[test]
fn layers_load_from_checkpoints_compressed_or_not() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let model = common::model::write_model(&dir.path().join("model"), 1, 256);
    let packed = dir.path().join("packed");
    convert::compress(&model, &packed, &Default::default(), &()).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let x = random(&[1, 256], DType::F32)?;
    let mut results = Vec::new();
    for path in [&model, &packed] {
        let checkpoint = Arc::new(Checkpoint::open(path)?);
        let layer = CompressedLinear::load(&checkpoint, name, None, &Options::default())?;
        // The layer keeps the map alive.
        drop(checkpoint);
        results.push(layer.forward(&x)?.to_vec2::<f32>()?);
    }
    assert_eq!(results[0], results[1]);
    let checkpoint = Arc::new(Checkpoint::open(&packed)?);
    let int8 = Options { codec: Codec::Int8, ..Options::default() };
    for (name, cause) in [("model.layers.0.ids.weight", "I64"), ("nothing", "nothing")] {
        let error = CompressedLinear::load(&checkpoint, name, None, &int8).unwrap_err().to_string();
        assert!(error.contains(cause), "{error}");
    }
    Ok(())
}

#[test]
fn a_tile_found_damaged_while_running_is_named() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let model = common::model::write_model(&dir.path().join("model"), 1, 300);
    let packed = dir.path().join("packed");
    convert::compress(&model, &packed, &Default::default(), &()).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let file = packed.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor(name).unwrap().data();
    let last = data.as_ptr() as usize - bytes.as_ptr() as usize + data.len() - 40;
    bytes[last] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&packed)?);
    let layer = CompressedLinear::load(&checkpoint, name, None, &Options::default())?;
    let x = random(&[1, layer.weight().geometry().cols], DType::F32)?;
    let embedding = CompressedEmbedding::load(&checkpoint, name, DType::F32, &Options::default())?;
    let last_row = Tensor::new(&[layer.weight().geometry().rows as u32 - 1], &Device::Cpu)?;
    let start = format!("{}: tensor {name}: tile ", file.display());
    for result in [
        layer.forward(&x),
        layer.forward(&Tensor::cat(&[&x, &x], 0)?),
        CompressedLinear::forward_each([&layer, &layer], &x).map(|[y, _]| y),
        embedding.forward(&last_row),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(&start) && error.contains("checksum"), "{error}");
    }
    let error = layer.to_dense().unwrap_err().to_string();
    assert!(error.starts_with(&start), "{error}");
    let error = layer.forward(&x.narrow(1, 0, 3)?).unwrap_err().to_string();
    assert!(error.contains(name), "{error}");
    Ok(())
}
