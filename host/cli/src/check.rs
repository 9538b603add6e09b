//! `coracle check`: what is there and what is missing, each with its mend.

use anyhow::Result;

use crate::{network, place, rootfs, shim};

pub(crate) fn run() -> Result<u8> {
    let report = shim::probe("")?;
    let mut failed = false;
    let mut line = |name: &str, part: &serde_json::Value, good: &str| {
        if part["ok"] == true {
            println!("ok       {name}: {}", part[good].as_str().unwrap_or("found"));
        } else {
            failed = true;
            println!("missing  {name}: {}", part["problem"].as_str().unwrap_or("unknown"));
        }
    };
    line("monitor", &report["monitor"], "name");
    // The built-in monitor needs no other program.
    if report["monitor"]["name"] != "builtin" {
        line("qemu", &report["qemu"], "path");
    }
    // Only volumes of an ordinary user's containers need it (and roots, where they are shared), and not each host has one that such a
    // user can start.
    if place::is_root() || report["virtiofsd"]["ok"] == true {
        line("virtiofsd", &report["virtiofsd"], "path");
    } else {
        println!("note     volumes: {}", report["virtiofsd"]["problem"].as_str().unwrap_or("no virtiofsd"));
    }
    line("guest image", &report["guest"], "kernel");
    line("accelerator", &report["accelerator"], "name");
    match rootfs::readiness() {
        Ok(text) => println!("ok       roots: {text}"),
        Err(error) => {
            failed = true;
            println!("missing  roots: {error:#}");
        }
    }
    match network::readiness() {
        Ok(text) => println!("ok       network: {text}"),
        Err(error) => {
            failed = true;
            println!("missing  network: {error:#}");
        }
    }
    if report["kvm"]["usable"] == true {
        println!("ok       kvm: usable");
    } else {
        println!("note     kvm: {}", report["kvm"]["reason"].as_str().unwrap_or("not usable"));
        println!(
            "note     machines are emulated, which is slow and no security boundary; containerd is refused it unless"
        );
        println!(
            "         the administrator sets `accelerator = \"any\"` in the table [machine] of /etc/coracle/config.toml"
        );
    }
    let vsock = match (&report["monitor"]["name"], &report["kernel_vsock"]) {
        (name, _) if name == "builtin" => "the monitor's own",
        (_, kernel) if kernel == true => "the kernel's",
        _ => "our own server",
    };
    println!("ok       vsock: {vsock}");
    Ok(u8::from(failed))
}
