//! Compiles `kernels/*.cu` with feature `cuda`; without it there is nothing to do.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::build();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{env, fs, thread};

    use cudaforge::CudaToolkit;

    /// Machine code for compute capability 8.x, PTX that the driver compiles for any later one, and machine code for
    /// Hopper. cudaforge's own builder makes one of them at a time.
    const TARGETS: [&str; 2] = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"];

    const NO_NVCC: &str = "feature `cuda` needs nvcc, the CUDA compiler, version 12 or later. Install the CUDA toolkit \
         (https://developer.nvidia.com/cuda-downloads, or the package cuda-toolkit, nvidia-cuda-toolkit or cuda of your \
         distribution) and put nvcc on the PATH, or name it with NVCC or CUDA_HOME. Without a GPU at hand set \
         CUDA_COMPUTE_CAP too, for candle's own kernels. A build for the CPU needs none of this: leave the feature out";

    pub fn build() {
        println!("cargo:rerun-if-changed=kernels");
        for name in ["NVCC", "CUDA_HOME", "NVCC_CCBIN", "DOCS_RS"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
            .expect("kernels/ lies beside build.rs")
            .map(|entry| entry.expect("kernels/ can be read").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .collect();
        sources.sort();
        let docs = env::var_os("DOCS_RS").is_some();
        if !docs {
            compile(&sources, &out);
        }
        let mut list = String::new();
        for source in &sources {
            let name = stem(source);
            let binary = if docs { "&[]".into() } else { format!("include_bytes!({:?})", image(source, &out)) };
            writeln!(list, "/// `kernels/{name}.cu`.\npub const {}: &[u8] = {binary};", name.to_uppercase()).unwrap();
        }
        fs::write(out.join("kernels.rs"), list).expect("OUT_DIR can be written");
    }

    fn stem(source: &Path) -> String {
        source.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn image(source: &Path, out: &Path) -> PathBuf {
        out.join(stem(source)).with_extension("fatbin")
    }

    /// A fat binary of each file, side by side.
    fn compile(sources: &[PathBuf], out: &Path) {
        let Ok(toolkit) = CudaToolkit::detect() else { panic!("{NO_NVCC}") };
        thread::scope(|scope| {
            for source in sources {
                let toolkit = &toolkit;
                scope.spawn(move || {
                    let mut nvcc = Command::new(&toolkit.nvcc_path);
                    nvcc.args(["-O3", "-std=c++17", "-fatbin"]);
                    TARGETS.iter().for_each(|target| _ = nvcc.args(["-gencode", target]));
                    if let Some(compiler) = env::var_os("NVCC_CCBIN") {
                        nvcc.arg("-allow-unsupported-compiler").arg("-ccbin").arg(compiler);
                    }
                    nvcc.arg("-o").arg(image(source, out)).arg(source);
                    match nvcc.output() {
                        Ok(result) if result.status.success() => {}
                        Ok(result) => {
                            panic!("nvcc failed on {}:\n{}", source.display(), String::from_utf8_lossy(&result.stderr))
                        }
                        Err(error) => panic!("{} cannot be run: {error}. {NO_NVCC}", toolkit.nvcc_path.display()),
                    }
                });
            }
        });
    }
}
