//! The standard streams of a process, chunk by chunk, and its terminal.

use std::sync::Arc;

use coracle_protocol::STREAM_CHUNK_BYTES;
use coracle_protocol::agent::{
    CloseStdinRequest, ReadStreamRequest, ReadStreamResponse, TtyWinResizeRequest, WriteStreamRequest,
    WriteStreamResponse,
};
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::process::Output;
use crate::state::Agent;
use crate::{Error, Result};

/// Writes to a process's input, all of it.
pub(crate) async fn write_stdin(agent: &Arc<Agent>, request: WriteStreamRequest) -> Result<WriteStreamResponse> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let stdin = process.stdin.lock().await;
    let stream = stdin.as_ref().ok_or_else(|| Error::State("the process's input is closed".into()))?;
    if !request.data.is_empty() {
        tokio::select! {
            // A process that has ended reads no more: without this a full pipe would hold the request for ever.
            _ = process.wait() => return Err(Error::NotFound("process".into())),
            written = stream.write_all(&request.data) => written.map_err(Error::system("write to the process's input"))?,
        }
    }
    let len = u32::try_from(request.data.len()).unwrap_or(u32::MAX);
    Ok(WriteStreamResponse { len, ..Default::default() })
}

/// Reads from a process's output; an empty answer is its end.
pub(crate) async fn read_stdout(agent: &Arc<Agent>, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let answer = read(&mut *process.stdout.lock().await, request.len).await;
    forget_if_done(agent, &request, answer)
}

/// Reads from a process's error output; an empty answer is its end.
pub(crate) async fn read_stderr(agent: &Arc<Agent>, request: ReadStreamRequest) -> Result<ReadStreamResponse> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let answer = read(&mut *process.stderr.lock().await, request.len).await;
    forget_if_done(agent, &request, answer)
}

async fn read(output: &mut Output, len: u32) -> Result<Vec<u8>> {
    let len = len.clamp(1, STREAM_CHUNK_BYTES) as usize;
    output.read(len).await.map_err(Error::system("read the process's output"))
}

fn forget_if_done(
    agent: &Arc<Agent>,
    request: &ReadStreamRequest,
    answer: Result<Vec<u8>>,
) -> Result<ReadStreamResponse> {
    let data = answer?;
    if data.is_empty() && !request.exec_id.is_empty() {
        agent.container(&request.container_id)?.forget_exec(&request.exec_id);
    }
    Ok(ReadStreamResponse { data, ..Default::default() })
}

/// Closes a process's input, so that it reads its end.
pub(crate) async fn close_stdin(agent: &Arc<Agent>, request: CloseStdinRequest) -> Result<Empty> {
    agent.process(&request.container_id, &request.exec_id)?.stdin.lock().await.take();
    Ok(Empty::new())
}

/// Sets the size of a process's terminal.
pub(crate) async fn resize(agent: &Arc<Agent>, request: TtyWinResizeRequest) -> Result<Empty> {
    let size = |value: u32| u16::try_from(value).map_err(|_| Error::Invalid(format!("{value} is no terminal size")));
    let (rows, columns) = (size(request.row)?, size(request.column)?);
    agent.process(&request.container_id, &request.exec_id)?.resize(rows, columns)?;
    Ok(Empty::new())
}
