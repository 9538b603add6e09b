//! Files that the guest gets a copy of, where it shares none with the host.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

use coracle_protocol::agent::CopyFileRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_storage::Copy;

use crate::agent::Patience;
use crate::pod::Pod;
use crate::{Error, Result};

/// The most bytes of a file that go in one request; a request as a whole has a bound (`REQUEST_BYTES_MAX`).
const PIECE: u64 = 1 << 20;
/// The largest file. It becomes memory of the guest.
const FILE_MAX: u64 = 64 << 20;

/// Copies the files.
pub(crate) async fn files(pod: &Pod, copies: &[Copy]) -> Result<()> {
    for copy in copies {
        let (source, target) = (copy.source.clone(), copy.target.clone());
        // A file of a network file system takes its time.
        let read = tokio::task::spawn_blocking(move || pieces(&source, &target));
        for piece in read.await.map_err(|error| Error::Failed(error.to_string()))?? {
            let call = async |agent: &AgentServiceClient, ctx| agent.copy_file(ctx, &piece).await;
            pod.agent.call("CopyFile", Patience::Bounded, call).await?;
        }
    }
    Ok(())
}

/// The requests that a file becomes; an empty one is one, too.
pub(crate) fn pieces(source: &std::path::Path, target: &str) -> Result<Vec<CopyFileRequest>> {
    let failed = |error: std::io::Error| Error::Failed(format!("copy {} to the guest: {error}", source.display()));
    let file = std::fs::File::open(source).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let size = metadata.len();
    if !metadata.is_file() || size > FILE_MAX {
        return Err(Error::Invalid(format!(
            "{} can't be copied to the guest: it is no file, or larger than {FILE_MAX} bytes",
            source.display()
        )));
    }
    let mut pieces = Vec::new();
    let mut offset = 0;
    loop {
        let mut data = Vec::new();
        // No more than it had: it may be growing.
        (&file).take(PIECE.min(size - offset)).read_to_end(&mut data).map_err(failed)?;
        let count = data.len() as u64;
        pieces.push(CopyFileRequest {
            path: target.to_owned(),
            file_size: size.cast_signed(),
            file_mode: metadata.mode(),
            dir_mode: 0o755,
            // The host's owner is nobody in the guest.
            uid: 0,
            gid: 0,
            offset: offset.cast_signed(),
            data,
            ..Default::default()
        });
        offset += count;
        if count == 0 || offset >= size {
            return Ok(pieces);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_becomes_pieces() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sizes = |size: u64| {
            file.as_file().set_len(size).unwrap();
            let pieces = pieces(file.path(), "/g/f").unwrap();
            assert!(pieces.iter().all(|piece| piece.path == "/g/f" && piece.file_size.cast_unsigned() == size));
            pieces.iter().map(|piece| (piece.offset, piece.data.len())).collect::<Vec<_>>()
        };
        assert_eq!(sizes(0), [(0, 0)]);
        assert_eq!(sizes(PIECE), [(0, 1 << 20)]);
        assert_eq!(sizes(PIECE + 1), [(0, 1 << 20), (1 << 20, 1)]);
        file.as_file().set_len(FILE_MAX + 1).unwrap();
        assert!(matches!(pieces(file.path(), "/g/f"), Err(Error::Invalid(_))));
        assert!(matches!(pieces(std::path::Path::new("/"), "/g/f"), Err(Error::Invalid(_))));
    }
}
