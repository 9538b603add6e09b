//! One question to a pod's agent: GetMetrics, by the bytes of ttrpc and protobuf themselves, for xtask links no crate of
//! either wing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// The agent's port.
const PORT: u32 = 1024;
/// The largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The agent's own figures, by name.
pub(crate) fn metrics(socket: &Path) -> Result<Vec<(String, u64)>> {
    let mut stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("the guest's answer")?;
        line.extend(byte);
    }
    if !line.starts_with(b"OK ") {
        bail!("the guest does not listen");
    }
    // Request: field 1 the service, field 2 the method, both texts.
    let mut request = Vec::new();
    for (field, text) in [(1_u8, "grpc.AgentService"), (2, "GetMetrics")] {
        request.extend([field << 3 | 2, u8::try_from(text.len())?]);
        request.extend(text.as_bytes());
    }
    // A frame: length, stream 1, type 1 (request), no flags.
    stream.write_all(&u32::try_from(request.len())?.to_be_bytes())?;
    stream.write_all(&[0, 0, 0, 1, 1, 0])?;
    stream.write_all(&request)?;
    let mut header = [0; 10];
    stream.read_exact(&mut header).context("the agent's answer")?;
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if length > ANSWER_BYTES_MAX {
        bail!("the agent's answer is too large");
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).context("the agent's answer")?;
    // Response: field 1 the status, field 2 the payload, whose field 1 is the text.
    let payload = field(&answer, 2).context("the agent's answer has no payload")?;
    let text = String::from_utf8_lossy(field(payload, 1).context("the agent's metrics")?).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect())
}

/// The first field of that number with a length, in a protobuf message of such fields only.
fn field(mut message: &[u8], wanted: u64) -> Option<&[u8]> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let length = usize::try_from(varint(&mut message)?).ok()?;
        let (value, rest) = message.split_at_checked(length)?;
        if key == wanted << 3 | 2 {
            return Some(value);
        }
        message = rest;
    }
    None
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
