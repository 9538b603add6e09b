//! Generates the messages and the ttrpc service code from `proto/`.
use std::{env, fs, path::PathBuf};

const FILES: [&str; 5] = ["agent", "health", "oci", "types", "csi"];
const SERVICES: [&str; 2] = ["agent", "health"];

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| std::io::Error::other("OUT_DIR is not set"))?);
    let inputs: Vec<String> = FILES.iter().map(|file| format!("proto/{file}.proto")).collect();
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(&inputs)
        .include("proto")
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    // The generated files start with inner attributes, so they are named as modules and not included one by one.
    let modules = FILES
        .iter()
        .map(|file| (*file).to_owned())
        .chain(SERVICES.iter().map(|service| format!("{service}_ttrpc")))
        .map(|module| format!("pub mod {module};\n"))
        .collect::<String>();
    fs::write(out.join("rpc_modules.rs"), modules)
}
