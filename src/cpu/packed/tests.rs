use std::path::PathBuf;

use super::*;
use crate::cpu::isa::Isa;
use crate::cpu::linear::tests::BLOCKS;
use crate::cpu::linear::{FloatType, Format, Linear, Matrix, Stored};
use crate::cpu::pool::Pool;

const FORMATS: [Format; 5] = [
    Format::F32,
    Format::F16,
    Format::Bf16,
    Format::Int8,
    Format::Int4,
];
const ROWS: usize = 20;
const COLUMNS: usize = 512;

/// Bytes without a pattern, the same every time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

/// One layer of every kind, every other one with a bias.
fn layers() -> Vec<Linear> {
    let floats: Vec<u8> = (0..ROWS * COLUMNS)
        .flat_map(|at| ((at % 97) as f32 * 0.37 - 18.0).to_le_bytes())
        .collect();
    let bias: Vec<f32> = (0..ROWS).map(|at| at as f32).collect();
    let blocks = BLOCKS.map(|block| {
        let bytes = noise(ROWS * COLUMNS / block.elements() * block.bytes());
        (Stored::Blocks(block), bytes)
    });
    let formats = FORMATS.map(|format| (Stored::Floats(FloatType::F32, format), floats.clone()));
    let pool = Pool::new(2);
    let each = blocks.iter().chain(&formats).enumerate();
    each.map(|(at, (stored, bytes))| {
        let matrix = Matrix {
            stored: *stored,
            rows: ROWS,
            columns: COLUMNS,
            bytes,
            bias: (at % 2 == 1).then_some(&bias),
        };
        Linear::pack(Isa::detect(), &pool, &[matrix])
            .unwrap()
            .remove(0)
    })
    .collect()
}

/// A file that is removed with this.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Self {
        let name = format!("lmserve-packed-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, b"").unwrap();
        Self(path)
    }

    fn read(&self, key: &str) -> Result<PackedFile, String> {
        PackedFile::open(&self.0, key, Isa::detect(), Some(&Pool::new(2)))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

fn write(file: &Temporary, maps: bool) -> Vec<Linear> {
    let mut packed = layers();
    let mut writer = PackedWriter::new(&file.0, Isa::detect(), maps).unwrap();
    let (first, rest) = packed.split_at_mut(3);
    writer.write("first", &mut first.iter_mut().collect::<Vec<_>>());
    writer.write("rest", &mut rest.iter_mut().collect::<Vec<_>>());
    let size = writer.finish("key").unwrap();
    assert_eq!(size, std::fs::metadata(&file.0).unwrap().len());
    packed
}

fn same(found: &[Linear], expected: &[Linear]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.packed_shape(), expected.packed_shape());
        assert_eq!(found.arrays(), expected.arrays());
    }
}

#[test]
fn layers_of_every_kind_come_back_as_they_were_packed() {
    for maps in [false, true] {
        let file = Temporary::new(&format!("whole-{maps}"));
        let packed = write(&file, maps);
        let expected = layers();
        same(&packed, &expected);
        assert_eq!(made_of(&file.0).unwrap(), "key");
        let read = file.read("key").unwrap();
        same(&read.layers("first", true).unwrap(), &expected[..3]);
        let rest = read.layers("rest", false).unwrap();
        assert!(read.layers("last", true).is_none());
        drop(read);
        // What is mapped outlives the file that it was read by, and a copy of it too.
        same(&rest.clone(), &expected[3..]);
    }
}

#[test]
fn a_file_of_other_weights_or_that_is_no_such_file_is_refused() {
    let file = Temporary::new("other");
    write(&file, false);
    let refused = file.read("another key").err().unwrap();
    assert!(refused.contains("other weights"), "{refused}");
    for bytes in [&b""[..], b"GGUF", &[0; 64], &noise(4096)] {
        std::fs::write(&file.0, bytes).unwrap();
        assert!(file.read("key").is_err());
        assert!(made_of(&file.0).is_err());
    }
}

#[test]
fn a_file_that_was_cut_or_has_a_flipped_bit_is_refused() {
    let file = Temporary::new("damaged");
    write(&file, false);
    let whole = std::fs::read(&file.0).unwrap();
    for len in [whole.len() - 1, whole.len() / 2, 70_000, 63] {
        std::fs::write(&file.0, &whole[..len]).unwrap();
        assert!(file.read("key").is_err(), "{len} bytes");
    }
    let used: Vec<usize> = (0..32)
        .chain((64 << 10..whole.len()).step_by(4093))
        .chain([whole.len() - 1])
        .collect();
    for at in used {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&file.0, &flipped).unwrap();
        // Between groups there is nothing to damage.
        assert!(file.read("key").is_err() || whole[at] == 0, "byte {at}");
    }
    std::fs::write(&file.0, &whole).unwrap();
    assert!(file.read("key").is_ok());
}

#[test]
fn a_disk_that_fails_is_told_at_the_end_and_weights_stay() {
    // Not every system has such a device.
    let Ok(mut writer) = PackedWriter::new("/dev/full".as_ref(), Isa::detect(), false) else {
        return;
    };
    let mut packed = layers();
    for label in ["a", "b", "c"] {
        writer.write(label, &mut packed.iter_mut().collect::<Vec<_>>());
    }
    same(&packed, &layers());
    assert!(writer.finish("key").is_err());
}

#[test]
fn what_is_packed_is_what_this_version_of_the_file_says() {
    let mut sum = crc32fast::Hasher::new();
    for layer in layers() {
        for array in layer.arrays() {
            sum.update(array);
        }
    }
    assert_eq!(
        sum.finalize(),
        0xa8d4_f4c3,
        "files that were written before have another layout: raise VERSION in table.rs"
    );
}
