//! What tests need inside a guest, and busybox has not.
//!
//! `guest-probe vsock PORT BYTES`: connects to the host's vsock port and writes BYTES bytes (each its index modulo 251) in
//! one call. It says how many the call took. `guest-probe get ADDRESS:PORT PATH`: prints what an HTTP server answers.
//! As a guest's `/init` it prints the guest's clock at its first instruction, and waits.
//! `guest-probe call NAME ARGUMENT`: makes a system call (keyctl, getpid), and prints "ok" or the kernel's refusal.

use std::io::{Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    // The first process of a container is another one.
    if std::process::id() == 1 && words.first().is_some_and(|name| name == "/init") {
        return as_init();
    }
    let [_, verb, first, second] = words.as_slice() else { return usage() };
    let outcome = match (verb.as_str(), first.parse::<u32>(), second.parse::<usize>()) {
        ("vsock", Ok(port), Ok(bytes)) => write_once(port, bytes).map(|taken| taken.to_string()),
        ("get", _, _) => get(first, second),
        ("call", _, Ok(argument)) => call(first, argument),
        _ => return usage(),
    };
    match outcome {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says how long the guest has been running, in microseconds, and stays: the end of the first process is a panic.
fn as_init() -> ExitCode {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live variable of the type that the call writes.
    #[expect(unsafe_code, reason = "the clock since boot")]
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    println!("guest-probe: init after {} us ({result})", time.tv_sec * 1_000_000 + time.tv_nsec / 1000);
    loop {
        std::thread::park();
    }
}

/// One request of HTTP 1.0; the whole answer.
fn get(address: &str, path: &str) -> std::io::Result<String> {
    let address: std::net::SocketAddr = address.parse().map_err(std::io::Error::other)?;
    let mut stream = std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(20))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn usage() -> ExitCode {
    eprintln!("usage: guest-probe vsock PORT BYTES | get ADDRESS:PORT PATH | call NAME ARGUMENT");
    ExitCode::from(2)
}

/// One system call.
fn call(name: &str, argument: usize) -> std::io::Result<String> {
    let number = match name {
        "keyctl" => libc::SYS_keyctl,
        "getpid" => libc::SYS_getpid,
        other => return Err(std::io::Error::other(format!("the call {other} is not known here"))),
    };
    // SAFETY: neither call takes a pointer; a wrong argument is answered with an error.
    #[expect(unsafe_code, reason = "the call under test")]
    let result = unsafe { libc::syscall(number, argument, 0, 0, 0, 0) };
    Ok(if result < 0 { std::io::Error::last_os_error().to_string() } else { "ok".into() })
}

fn write_once(port: u32, bytes: usize) -> std::io::Result<isize> {
    let data: Vec<u8> = (0..bytes).map(|index| u8::try_from(index % 251).unwrap_or(0)).collect();
    // SAFETY: an all-zero sockaddr_vm is a valid value of that plain C structure.
    #[expect(unsafe_code, reason = "a C structure")]
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address and the data live through the calls, and the lengths are theirs.
    #[expect(unsafe_code, reason = "the calls under test, as a C program makes them")]
    let result = unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
        if socket < 0 || libc::connect(socket, (&raw const address).cast(), length) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        libc::write(socket, data.as_ptr().cast(), data.len())
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}
