//! `cargo xtask test`: the lanes.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::build::{self, Built};
use crate::builtin::Lane;
use crate::image;
use crate::setup::{self, Level};
use crate::steps::{self, command, step};

/// Run every test lane that this machine can run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these lanes: unit, board, flow, faults, contract, e2e, builtin; and passthrough and soak, which run by name alone.
    #[arg(long, value_delimiter = ',')]
    lane: Vec<String>,
    /// Of the lane builtin all tests, not only those that run each time: in the lab this takes hours.
    #[arg(long)]
    all: bool,
    /// Of the lane builtin with the guest's kernel of this package.
    #[arg(long, value_name = "PACKAGE", default_value = KERNEL)]
    kernel: String,
    /// Only tests whose names hold this.
    filter: Option<String>,
}

const LANES: [&str; 9] = ["unit", BOARD, "flow", "faults", "contract", "e2e", "builtin", PASSTHROUGH, SOAK];

/// The dashboard's pages in a browser.
const BOARD: &str = "board";

/// Lanes that run by their names alone: a clone with an IOMMU does not always come up (docs/reliability.md), and a soak takes half an hour.
const PASSTHROUGH: &str = "passthrough";
const SOAK: &str = "soak";

/// The programs of the lane flow: all but those of `faults` and `soak`, which have lanes of their own.
fn flow_programs() -> Result<Vec<String>> {
    let folder = std::fs::read_dir(steps::top().join("tests/flow/tests")).context("the tests without machines")?;
    let files = folder.flatten().filter_map(|file| file.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned));
    Ok(files.filter(|name| name != "faults" && name != "soak").collect())
}

/// How many pods the soak makes on QEMU, and how many at a time.
const SOAK_PODS: (usize, usize) = (200, 4);

/// The package that stands for the newest kernel for virtual machines: of the guest under test, and of the lab.
pub(crate) const KERNEL: &str = "linux-image-cloud-amd64";

/// The second kernel on which the guest is tested, where apt has it.
pub(crate) const OTHER_KERNEL: &str = "linux-image-6.12-cloud-amd64";

/// The kernel that a distribution's users have.
const USUAL_KERNEL: &str = "linux-image-amd64";

pub(crate) fn run(args: &Args) -> Result<()> {
    for lane in &args.lane {
        if !LANES.contains(&lane.as_str()) {
            bail!("there is no lane {lane}; there are {}", LANES.join(", "));
        }
    }
    let named = |lane: &str| args.lane.iter().any(|given| given == lane);
    let wanted = |lane: &str| named(lane) || args.lane.is_empty() && lane != PASSTHROUGH && lane != SOAK;
    setup::ensure(Level::Test)?;
    let filter: Vec<&str> = args.filter.as_deref().into_iter().collect();
    if wanted("unit") {
        step("lane unit", || {
            let mut arguments = vec!["test", "--workspace", "--locked"];
            arguments.extend(["--exclude", "coracle-e2e", "--exclude", "coracle-flow", "--"]);
            arguments.extend(&filter);
            steps::run(command("cargo", &arguments))
        })?;
    }
    if wanted(BOARD) {
        crate::board::lane(&filter)?;
    }
    if !LANES.iter().any(|lane| *lane != "unit" && *lane != BOARD && wanted(lane)) {
        return Ok(());
    }
    let built = build::all()?;
    if !setup::is_root() {
        println!("lanes left out: flow, faults, contract, e2e, builtin (they need root: run this by sudo)");
        return Ok(());
    }
    if wanted("flow") {
        let programs = flow_programs()?;
        let programs: Vec<&str> = programs.iter().map(String::as_str).collect();
        step("lane flow", || without_machine(&built, &programs, &filter))?;
    }
    if wanted("faults") {
        step("lane faults", || without_machine(&built, &["faults"], &[&filter[..], &["--nocapture"]].concat()))?;
    }
    if wanted(SOAK) {
        step("lane soak, no machines", || {
            without_machine(&built, &["soak"], &[&filter[..], &["--nocapture", "--test-threads=1"]].concat())
        })?;
        let (pods, at_once) = SOAK_PODS;
        step(&format!("lane soak, {pods} pods on QEMU"), || crate::pods::churn(&built, pods, at_once))?;
    }
    machine_lanes(&built, wanted("contract"), wanted("e2e"), &filter)?;
    if wanted("builtin") || wanted(PASSTHROUGH) {
        let lane = Lane {
            built: &built,
            kernel: args.kernel.clone(),
            guest: built.guest(&args.kernel)?,
            other: other_guest(&built, OTHER_KERNEL).ok(),
            usual: other_guest(&built, USUAL_KERNEL).ok(),
            image: test_image(&built)?,
        };
        if wanted("builtin") {
            lane.run(args.all, &filter)?;
        }
        if wanted(PASSTHROUGH) {
            lane.pass_devices_on(&filter)?;
        }
    }
    println!(
        "left out: containerd 1.7 and 2.x, all tests on the built-in monitor, passed devices, the soak (run by name, see docs)"
    );
    Ok(())
}

/// Programs of the tests that need no machine, with these words.
fn without_machine(built: &Built, programs: &[&str], words: &[&str]) -> Result<()> {
    let mut test = command("cargo", &["test", "--locked", "-p", "coracle-flow"]);
    test.args(programs.iter().flat_map(|program| ["--test", program]));
    test.arg("--").args(words).env("CORACLE_TEST_AGENT", built.agent());
    steps::run(test)
}

/// The tests of sealed machines: the others need containerd with a snapshotter that hands over disks, or devices that come later.
const SEALED: [&str; 2] = ["--test", "run"];

/// The lanes that need a guest.
fn machine_lanes(built: &Built, contract: bool, e2e: bool, filter: &[&str]) -> Result<()> {
    let guest = built.guest(KERNEL)?;
    let environment = |command: &mut std::process::Command| {
        command.env("CORACLE_TEST_GUEST", &guest).env("CORACLE_TEST_SHIM", built.shim());
    };
    if contract {
        step("lane contract (QEMU)", || {
            let mut contract =
                command("cargo", &["test", "--locked", "-p", "coracle-driver-qemu", "--test", "contract", "--"]);
            contract.args(filter);
            environment(&mut contract);
            steps::run(contract)
        })?;
    }
    if e2e {
        let folder = test_image(built)?;
        let other = other_guest(built, OTHER_KERNEL);
        let prometheus = crate::lab::package(&built.work(), "prometheus");
        let run = |tests: &[&str], sealed: bool| {
            let mut e2e = command("cargo", &["test", "--locked", "--no-fail-fast", "-p", "coracle-e2e"]);
            e2e.args(tests)
                .args(["--", "--test-threads=2"])
                .args(filter)
                .env("CORACLE_TEST_BINARY", built.coracle())
                .env("CORACLE_TEST_AGENT", built.agent())
                .env("CORACLE_TEST_IMAGE", &folder);
            environment(&mut e2e);
            if sealed {
                e2e.env("CORACLE_TEST_SEALED", "1");
            }
            match &other {
                Ok(other) => drop(e2e.env("CORACLE_TEST_OTHER_GUEST", other)),
                Err(error) => println!("tests left out: those on {OTHER_KERNEL} ({error:#})"),
            }
            match &prometheus {
                Ok(folder) => drop(e2e.env("CORACLE_TEST_PROMETHEUS", folder.join("usr/bin/prometheus"))),
                Err(error) => println!("tests left out: those with Prometheus ({error:#})"),
            }
            steps::run(e2e)
        };
        step("lane e2e (QEMU)", || run(&[], false))?;
        // Those that can pass by the rules of confidential guests: each says where it can't.
        step("lane e2e, sealed machines (QEMU)", || run(&SEALED, true))?;
    }
    Ok(())
}

/// The image that containers of tests are made of.
fn test_image(built: &Built) -> Result<std::path::PathBuf> {
    let folder = built.work().join("test-image");
    image::make(&folder, &[("guest-probe", built.guest_probe())])?;
    Ok(folder)
}

pub(crate) fn other_guest(built: &Built, kernel: &str) -> Result<std::path::PathBuf> {
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("no apt-get");
    }
    built.guest(kernel)
}
