//! The kernels for compute capability 8.0, and those with FP8 for 8.9, wherever the tests run.

use std::env;
use std::process::Command;

use candle_taper::cuda::LoadedKernels;

use crate::gpu;

/// Tells the driver to compile PTX and to ignore machine code, in the whole process.
const FORCE: &str = "CUDA_FORCE_PTX_JIT";
/// Tests that call no cuBLAS, which need not have PTX for this GPU.
const TESTS: [&str; 8] = [
    "small::products",
    "small::kquants",
    "small::decoding",
    "small::graphs",
    "small::activations_as_fp8",
    "fp8::rounded_activations_are_multiplied_right",
    "fp8::wide_blocks_and_large_grids_are_multiplied_right",
    "fp8::rows_with_specials_or_of_any_size_are_rows_apart",
];

/// The only PTX is for 8.0, but for products with FP8 activations: 8.9. In a process of its own, where this test says what was
/// loaded.
#[test]
fn kernels_for_8_0_pass_the_tests_too() {
    let Some(device) = gpu() else { return };
    if env::var_os(FORCE).is_some() {
        let loaded = LoadedKernels::of(device.as_cuda_device().unwrap()).unwrap();
        assert_eq!(loaded.compute_capability(), (8, 0));
        return;
    }
    let own = "portable::kernels_for_8_0_pass_the_tests_too";
    let mut program = Command::new(env::current_exe().unwrap());
    let result = program.args(TESTS).args([own, "--exact"]).env(FORCE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&result.stdout);
    let passed = format!("{} passed", TESTS.len() + 1);
    assert!(result.status.success() && said.contains(&passed), "{said}{}", String::from_utf8_lossy(&result.stderr));
}
