//! `guest-probe vsock PORT BYTES`: connects to the host's vsock port and writes BYTES bytes (each its index modulo 251) in
//! one call. It says how many the call took.

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let [_, verb, port, bytes] = words.as_slice() else { return usage() };
    let (Ok(port), Ok(bytes)) = (port.parse::<u32>(), bytes.parse::<usize>()) else { return usage() };
    if verb != "vsock" {
        return usage();
    }
    match write_once(port, bytes) {
        Ok(taken) => {
            println!("{taken}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("guest-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: guest-probe vsock PORT BYTES");
    ExitCode::from(2)
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
