//! Measures the dashboard on a project that is made up: import, evidence, pages under readers, memory, export.
//!
//! `cargo run --release -p coracle-ci --example measure -- [JOBS NIGHTS TESTS [DATABASE]]`

#[path = "../tests/made_up/mod.rs"]
mod made_up;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use coracle_ci::collect::{Collected, collect};
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::{Point, Store};
use coracle_ci::{evidence, export, serve, times};
use made_up::{FIRST, MadeUp, PROJECT, drawn, point};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, database] = arguments.as_slice()
        && word == "serve"
    {
        return serve_alone(PathBuf::from(database));
    }
    let number = |at: usize, usual: i64| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let made = MadeUp { jobs: number(0, 400), nights: number(1, 365), tests: number(2, 20_000), failures: 50 };
    let folder = tempfile::tempdir()?;
    let database = arguments.get(3).map_or_else(|| folder.path().join("ci.db"), PathBuf::from);
    let settings = Settings::read(None)?;
    let begin = Instant::now();
    let mut collected = Collected::default();
    let mut store = Store::open(&database)?;
    let repository = Repository::named(PROJECT);
    collect(&mut store, &mut made.clone(), &settings, &repository, 0, &mut collected)?;
    let took = begin.elapsed().as_secs_f64();
    println!(
        "import: {} jobs and {} results in {took:.1} s: {:.0} results a second",
        collected.jobs,
        collected.results,
        collected.results as f64 / took
    );
    let points: Vec<Point> = (0..made.nights).map(|night| point(night, made.nights, 30.0)).collect();
    store.store_points(PROJECT, &points, None)?;
    let begin = Instant::now();
    evidence::derive(&mut store, &settings, FIRST + made.nights * times::DAY)?;
    println!("evidence: {:.1} s", begin.elapsed().as_secs_f64());
    drop(store);
    println!("database: {} MB", std::fs::metadata(&database)?.len() / 1_000_000);
    if arguments.get(4).is_some_and(|word| word == "only") {
        return Ok(());
    }
    pages(&database, made)?;
    let begin = Instant::now();
    let written = export::export(&Store::open_to_read(&database)?, &settings, &folder.path().join("site"))?;
    println!(
        "export: {} pages, {} MB, {:.1} s",
        written.pages,
        written.bytes / 1_000_000,
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

/// 50 readers, each asking for pages one after another; the time is the one from the request's end to the answer's. The server is a process of its own,
/// so that its memory is its own.
fn pages(database: &std::path::Path, made: MadeUp) -> Result<(), Box<dyn std::error::Error>> {
    use std::io::BufRead as _;
    let mut server = std::process::Command::new(std::env::current_exe()?)
        .arg("serve")
        .arg(database)
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    std::io::BufReader::new(server.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let address: SocketAddr = line.trim().parse()?;
    let before = resident(server.id())?;
    let readers: Vec<_> = (0..50_i64).map(|reader| std::thread::spawn(move || read(address, reader, made))).collect();
    let mut all: Vec<Duration> = Vec::new();
    for reader in readers {
        all.extend(reader.join().map_err(|_| "a reader failed")?);
    }
    all.sort();
    let at = |share: f64| all.get((all.len() as f64 * share) as usize).map_or(0.0, |time| time.as_secs_f64() * 1000.0);
    println!(
        "pages: {} by 50 readers at once: median {:.1} ms, 99 % {:.1} ms, worst {:.1} ms",
        all.len(),
        at(0.5),
        at(0.99),
        at(0.9999)
    );
    println!("memory of serve: {} KiB at first, {} KiB after", before, resident(server.id())?);
    server.kill()?;
    server.wait()?;
    Ok(())
}

fn serve_alone(database: PathBuf) -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let options = serve::ServeOptions { database, listen: SocketAddr::from(([127, 0, 0, 1], 0)), root: "/".to_owned() };
    let served = serve::serve(options, Settings::read(None)?, std::future::pending(), |address| println!("{address}"));
    Ok(runtime.block_on(served)?)
}

fn read(address: SocketAddr, reader: i64, made: MadeUp) -> Vec<Duration> {
    let mut times = Vec::new();
    for round in 0..40 {
        let pick = drawn(&[reader, round]);
        let path = match pick % 8 {
            0 => "/".to_owned(),
            1 => "/?status=failed&kind=required".to_owned(),
            2 | 3 => format!("/job/{}", 1 + (pick >> 8) % made.jobs as u64),
            4 | 5 => format!("/test/{}", 1 + (pick >> 8) % made.tests as u64),
            6 => ["/flakes", "/failures", "/cost?days=365", "/pulls", "/performance"][(pick >> 8) as usize % 5]
                .to_owned(),
            _ => format!("/api/v1/job/{}", 1 + (pick >> 8) % made.jobs as u64),
        };
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let Ok(mut stream) = TcpStream::connect(address) else { continue };
        let begin = Instant::now();
        let mut answer = Vec::new();
        let done = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut answer));
        assert!(done.is_ok() && answer.starts_with(b"HTTP/1.1 200"), "{path}");
        times.push(begin.elapsed());
    }
    times
}

/// Resident memory, in KiB.
fn resident(process: u32) -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).ok_or("no figure")?.parse()?)
}
