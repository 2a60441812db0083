//! Converts between f32 and the 16-bit floats (IEEE half precision and bfloat16), which are given as bits.

/// The value of a half-precision number; exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let value = match magnitude {
        // Infinities and NaNs keep their payload.
        0x7c00.. => f32::from_bits(0x7f80_0000 | (magnitude & 0x03ff) << 13),
        // Normal: the exponent is rebiased from 15 to 127.
        0x0400.. => f32::from_bits((magnitude << 13) + ((127 - 15) << 23)),
        // Subnormal: a multiple of 2^-24.
        _ => magnitude as f32 * f32::from_bits((127 - 24) << 23),
    };
    f32::from_bits(value.to_bits() | sign)
}

/// The nearest half-precision number, ties to even. A value that is too large becomes infinity.
pub fn f32_to_f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = value.to_bits() & 0x7fff_ffff;
    let bits = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x4780_0000 {
        0x7c00
    } else if magnitude >= 0x3880_0000 {
        // Normal: a carry out of the mantissa correctly raises the exponent, up to infinity.
        let rebiased = magnitude - ((127 - 15) << 23);
        let rounded = rebiased + 0x0fff + ((rebiased >> 13) & 1);
        (rounded >> 13) as u16
    } else {
        // Subnormal: after adding 0.5, the last bits of the sum are the multiple of 2^-24, rounded to even.
        let sum = f32::from_bits(magnitude) + 0.5;
        (sum.to_bits() - 0.5f32.to_bits()) as u16
    };
    bits | sign
}

/// The value of a bfloat16 number; exact.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The nearest bfloat16 number, ties to even.
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x0040;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_way_to_f32_and_back() {
        for bits in 0..=u16::MAX {
            let value = f16_to_f32(bits);
            if value.is_nan() {
                assert!(f16_to_f32(f32_to_f16(value)).is_nan());
            } else {
                assert_eq!(f32_to_f16(value), bits, "{bits:#06x} is {value}");
            }
            let value = bf16_to_f32(bits);
            if value.is_nan() {
                assert!(bf16_to_f32(f32_to_bf16(value)).is_nan());
            } else {
                assert_eq!(f32_to_bf16(value), bits, "{bits:#06x} is {value}");
            }
        }
    }

    #[test]
    fn known_halves() {
        for (bits, value) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(f16_to_f32(bits).to_bits(), f32::to_bits(value));
        }
    }

    #[test]
    fn rounding_goes_to_the_nearest_and_ties_to_even() {
        // Between two neighbours: below the middle, the middle, and above it.
        for bits in (0..0x7bff_u16).step_by(7) {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let middle = f32::midpoint(low, high);
            assert_eq!(f32_to_f16(middle), bits + (bits & 1));
            assert_eq!(f32_to_f16(middle.next_down()), bits);
            assert_eq!(f32_to_f16(middle.next_up()), bits + 1);
        }
        assert_eq!(f32_to_f16(65519.996), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(1e9), 0x7c00);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
    }
}
