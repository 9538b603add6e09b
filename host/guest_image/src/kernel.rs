//! From a bzImage to the ELF file inside it, which a monitor can start at its PVH entry without unpacking
//! (kernel: Documentation/arch/x86/boot.rst, fields `setup_sects`, `payload_offset`, `payload_length`).

use std::io::Read;

use crate::Error;

const SETUP_SECTS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The magic number of LZ4's legacy frame, which the kernel's build uses.
const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// The most that one block of that frame unpacks to, in bytes.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
/// The largest kernel that is unpacked, in bytes.
const KERNEL_BYTES_MAX: u64 = 512 << 20;

/// The uncompressed kernel. An image that is an ELF file already is given back as it is.
pub(crate) fn extract(image: &[u8]) -> Result<Vec<u8>, Error> {
    let bad = |text: &str| Error::Kernel(text.to_owned());
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err(bad("it is neither an ELF file nor a bzImage"));
    }
    let number = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let sectors = match image.get(SETUP_SECTS) {
        Some(0) | None => 4,
        Some(sectors) => usize::from(*sectors),
    };
    let start = (sectors + 1) * 512 + number(PAYLOAD_OFFSET).ok_or_else(|| bad("its header is short"))?;
    let length = number(PAYLOAD_LENGTH).ok_or_else(|| bad("its header is short"))?;
    let payload =
        start.checked_add(length).and_then(|end| image.get(start..end)).ok_or_else(|| bad("it is cut short"))?;
    let mut kernel = Vec::new();
    let unpacked = if payload.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        liblzma::read::XzDecoder::new(payload).take(KERNEL_BYTES_MAX).read_to_end(&mut kernel)
    } else if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        zstd::Decoder::new(payload)
            .map(|decoder| decoder.single_frame())
            .and_then(|decoder| decoder.take(KERNEL_BYTES_MAX).read_to_end(&mut kernel))
    } else if let Some(blocks) = payload.strip_prefix(&LZ4_LEGACY) {
        unpack_lz4(blocks, &mut kernel)
    } else {
        return Err(bad("its compression is none of xz, zstd and lz4"));
    };
    unpacked.map_err(|error| Error::Kernel(format!("it can't be unpacked: {error}")))?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(bad("what it holds is no ELF file"));
    }
    Ok(kernel)
}

/// Blocks of a length and its bytes. After the last one the kernel's build puts the unpacked size, which is no block.
fn unpack_lz4(mut blocks: &[u8], kernel: &mut Vec<u8>) -> std::io::Result<usize> {
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let Some(block) = rest.get(..u32::from_le_bytes(*length) as usize) else { break };
        if block.is_empty() || kernel.len() as u64 > KERNEL_BYTES_MAX {
            break;
        }
        let unpacked = lz4_flex::block::decompress(block, LZ4_BLOCK_BYTES).map_err(std::io::Error::other)?;
        kernel.extend(unpacked);
        blocks = &rest[block.len()..];
    }
    Ok(kernel.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&0_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn a_packed_kernel_comes_out() {
        let elf = b"\x7fELF and the rest";
        let packed = zstd::encode_all(elf.as_slice(), 1).unwrap();
        assert_eq!(extract(&bzimage(&packed)).unwrap(), elf);
        assert_eq!(extract(elf).unwrap(), elf);
    }

    #[test]
    fn lz4_blocks_are_joined() {
        let elf = [b"\x7fELF".as_slice(), &[7; 100_000]].concat();
        let mut packed = LZ4_LEGACY.to_vec();
        for part in elf.chunks(60_000) {
            // A block of literals only: a token, the length in steps of 255, the bytes.
            let mut block = vec![0xf0];
            let mut rest = part.len() - 15;
            while rest >= 255 {
                block.push(255);
                rest -= 255;
            }
            block.push(u8::try_from(rest).unwrap());
            block.extend(part);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
        assert_eq!(extract(&bzimage(&packed)).unwrap(), elf);
    }

    #[test]
    fn rubbish_is_refused() {
        let packed = zstd::encode_all(b"no kernel".as_slice(), 1).unwrap();
        for image in [vec![], vec![0; 2000], bzimage(b"lzma?"), bzimage(&packed), bzimage(&packed)[..1030].to_vec()] {
            assert!(extract(&image).is_err());
        }
        let mut far = bzimage(&packed);
        far[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(extract(&far).is_err());
    }
}
