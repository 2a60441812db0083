//! The form of a content in a file: 64 bytes that say what follows, and the content.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `lmservkv` |
//! | 1 | version of this form: 1 |
//! | 1 | kind: `b` or `s` |
//! | 6 | 0 |
//! | 32 | digest |
//! | 8 | length of the content, little-endian |
//! | 4 | CRC-32 of all before it and of the content, little-endian |
//! | 4 | 0 |

use super::key::Key;

pub(super) const HEAD_BYTES: usize = 64;
const CHECKSUM_AT: usize = 56;
const MAGIC: &[u8; 8] = b"lmservkv";
const VERSION: u8 = 1;

/// What stands before a content in its file.
pub(super) fn head(key: &Key, payload: &[u8]) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..8].copy_from_slice(MAGIC);
    head[8] = VERSION;
    head[9] = key.kind.letter() as u8;
    head[16..48].copy_from_slice(key.digest.bytes());
    head[48..CHECKSUM_AT].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&head[..CHECKSUM_AT]);
    checksum.update(payload);
    head[CHECKSUM_AT..60].copy_from_slice(&checksum.finalize().to_le_bytes());
    head
}

/// The content of a file, if it is whole and that of `key`.
pub(super) fn payload(key: &Key, mut file: Vec<u8>) -> Option<Vec<u8>> {
    let (found, payload) = file.split_at_checked(HEAD_BYTES)?;
    if found != head(key, payload) {
        return None;
    }
    file.drain(..HEAD_BYTES);
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::super::key::Digest;
    use super::*;

    #[test]
    fn any_flipped_bit_any_cut_and_any_other_key_is_found() {
        let key = Digest::root(&[]).block(&[1]).block_key();
        let content = vec![7, 0, 9];
        let file = [&head(&key, &content)[..], &content].concat();
        assert_eq!(payload(&key, file.clone()), Some(content));
        for bit in 0..file.len() * 8 {
            let mut broken = file.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(payload(&key, broken), None, "bit {bit}");
        }
        for len in 0..file.len() {
            assert_eq!(payload(&key, file[..len].to_vec()), None, "{len} bytes");
        }
        let longer = [&file[..], &[0]].concat();
        assert_eq!(payload(&key, longer), None);
        for other in [
            Digest::root(&[]).block(&[2]).block_key(),
            Digest::root(&[]).state_key(&[1]),
        ] {
            assert_eq!(payload(&other, file.clone()), None);
        }
    }
}
