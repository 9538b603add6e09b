//! Generates the messages that containerd's CRI describes a pod with, from `proto/`.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .input("proto/pod_sandbox_config.proto")
        .cargo_out_dir("cri")
        .run_from_script();
}
