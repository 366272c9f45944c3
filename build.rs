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
    /// The same of what needs FP8 tensor cores, which came with 8.9; Hopper has kernels of its own.
    const FP8_TARGETS: [&str; 1] = ["arch=compute_89,code=[sm_89,compute_89]"];

    const NO_NVCC: &str = "feature `cuda` needs nvcc, the CUDA compiler, version 12.4 or later. Install the CUDA toolkit \
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

    fn targets(source: &Path) -> &'static [&'static str] {
        if stem(source) == "fp8_mma" { &FP8_TARGETS } else { &TARGETS }
    }

    fn image(source: &Path, out: &Path) -> PathBuf {
        out.join(stem(source)).with_extension("fatbin")
    }

    /// A fat binary of each file, side by side. One that was made by the same command from files that have not changed
    /// since is kept: all of them together take minutes.
    fn compile(sources: &[PathBuf], out: &Path) {
        let Ok(toolkit) = CudaToolkit::detect() else { panic!("{NO_NVCC}") };
        thread::scope(|scope| {
            for source in sources {
                let toolkit = &toolkit;
                scope.spawn(move || {
                    let mut nvcc = Command::new(&toolkit.nvcc_path);
                    nvcc.args(["-O3", "-std=c++17", "-fatbin", "-MD"]);
                    targets(source).iter().for_each(|target| _ = nvcc.args(["-gencode", target]));
                    if let Some(compiler) = env::var_os("NVCC_CCBIN") {
                        nvcc.arg("-allow-unsupported-compiler").arg("-ccbin").arg(compiler);
                    }
                    let image = image(source, out);
                    nvcc.arg("-MF").arg(image.with_extension("d")).arg("-o").arg(&image).arg(source);
                    let command = format!("{nvcc:?}");
                    let made_by = image.with_extension("command");
                    if fs::read_to_string(&made_by).is_ok_and(|made_by| made_by == command) && is_fresh(&image) {
                        return;
                    }
                    // Written before nvcc reads and renamed when it has ended: its time is that of the start.
                    let started = image.with_extension("started");
                    fs::write(&started, command).expect("OUT_DIR can be written");
                    match nvcc.output() {
                        Ok(result) if result.status.success() => {}
                        Ok(result) => {
                            panic!("nvcc failed on {}:\n{}", source.display(), String::from_utf8_lossy(&result.stderr))
                        }
                        Err(error) => panic!("{} cannot be run: {error}. {NO_NVCC}", toolkit.nvcc_path.display()),
                    }
                    fs::rename(started, made_by).expect("OUT_DIR can be written");
                });
            }
        });
    }

    /// Whether no file that nvcc read for `image` has changed since it began. The list is a rule of make, by nvcc.
    fn is_fresh(image: &Path) -> bool {
        let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
        let begun = modified(&image.with_extension("command")).filter(|_| image.exists());
        let (Some(begun), Ok(rule)) = (begun, fs::read_to_string(image.with_extension("d"))) else {
            return false;
        };
        let Some((_, read)) = rule.split_once(" : ") else { return false };
        read.split_whitespace()
            .filter(|word| *word != "\\")
            .all(|path| modified(Path::new(path)).is_some_and(|changed| changed < begun))
    }
}
