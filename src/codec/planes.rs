//! Bit planes: `width` bits of every weight, packed little-endian within bytes (weight `i` sits at bit
//! `i % (8 / width) · width` of byte `i / (8 / width)`).
//!
//! A field of `bits` bits is stored as whole-byte planes from the lowest bits up, then the rest as planes of 4, 2 and
//! 1 bits: 24 = 8+8+8, 11 = 8+2+1, 3 = 2+1.

/// Bytes of a plane of `width` bits for `n` weights.
pub fn plane_bytes(n: usize, width: u32) -> usize {
    (n * width as usize).div_ceil(8)
}

/// The `(shift, width)` of each plane of a field of `bits` bits, lowest bits first.
pub fn planes(bits: u32) -> impl Iterator<Item = (u32, u32)> {
    let rest = bits % 8;
    let whole = (0..bits / 8).map(|p| (8 * p, 8));
    let part = [4, 2, 1].into_iter().scan(bits - rest, move |shift, width| {
        let at = *shift;
        let used = rest & width != 0;
        *shift += if used { width } else { 0 };
        Some(used.then_some((at, width)))
    });
    whole.chain(part.flatten())
}

/// Bytes of all planes of a field of `bits` bits for `n` weights.
pub fn field_bytes(n: usize, bits: u32) -> usize {
    planes(bits).map(|(_, width)| plane_bytes(n, width)).sum()
}

/// Appends one plane: the lowest `width` bits of each item's `value`.
#[inline(always)]
fn pack<T: Copy>(items: &[T], width: u32, out: &mut Vec<u8>, value: impl Fn(T) -> u32) {
    let start = out.len();
    out.resize(start + plane_bytes(items.len(), width), 0);
    let plane = &mut out[start..];
    match width {
        8 => plane.iter_mut().zip(items).for_each(|(byte, &item)| *byte = value(item) as u8),
        4 => pack_part::<T, 4>(items, plane, value),
        2 => pack_part::<T, 2>(items, plane, value),
        _ => pack_part::<T, 1>(items, plane, value),
    }
}

#[inline(always)]
fn pack_part<T: Copy, const WIDTH: usize>(items: &[T], plane: &mut [u8], value: impl Fn(T) -> u32) {
    let mask = (1u32 << WIDTH) - 1;
    let byte = |items: &[T]| {
        let bits = |(k, &item): (usize, &T)| (value(item) & mask) << (k * WIDTH);
        items.iter().enumerate().fold(0, |byte, item| byte | bits(item)) as u8
    };
    let whole = items.chunks_exact(8 / WIDTH);
    let rest = whole.remainder();
    plane.iter_mut().zip(whole).for_each(|(out, items)| *out = byte(items));
    if let (false, Some(last)) = (rest.is_empty(), plane.last_mut()) {
        *last = byte(rest);
    }
}

/// Adds a plane's bits, shifted left by `shift`, to the fields in `out`. A short plane leaves the rest as it was.
#[inline(always)]
pub fn unpack(plane: &[u8], width: u32, shift: u32, out: &mut [u32]) {
    let per = (8 / width) as usize;
    let mask = ((1u32 << width) - 1) as u8;
    for (fields, &byte) in out.chunks_mut(per).zip(plane) {
        for (k, field) in fields.iter_mut().enumerate() {
            *field |= (((byte >> (k as u32 * width)) & mask) as u32) << shift;
        }
    }
}

/// Reads a whole field of `bits` bits for `out.len()` weights from its planes, which lie one after another.
#[inline(always)]
pub fn unpack_field(mut bytes: &[u8], bits: u32, out: &mut [u32]) {
    out.fill(0);
    for (shift, width) in planes(bits) {
        let (plane, rest) = bytes.split_at(plane_bytes(out.len(), width).min(bytes.len()));
        match width {
            8 => unpack(plane, 8, shift, out),
            4 => unpack(plane, 4, shift, out),
            2 => unpack(plane, 2, shift, out),
            _ => unpack(plane, 1, shift, out),
        }
        bytes = rest;
    }
}

/// Appends all planes of a field of `bits` bits: those of each item's `value`.
#[inline(always)]
pub fn pack_field<T: Copy>(items: &[T], bits: u32, out: &mut Vec<u8>, value: impl Fn(T) -> u32) {
    for (shift, width) in planes(bits) {
        pack(items, width, out, |item| value(item) >> shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_split_into_the_planes_of_the_specification() {
        let of = |bits| planes(bits).collect::<Vec<_>>();
        assert_eq!(of(24), [(0, 8), (8, 8), (16, 8)]);
        assert_eq!(of(11), [(0, 8), (8, 2), (10, 1)]);
        assert_eq!(of(3), [(0, 2), (2, 1)]);
        assert_eq!(of(7), [(0, 4), (4, 2), (6, 1)]);
        assert_eq!(of(0), []);
    }

    #[test]
    fn fields_survive_packing_at_every_width_and_length() {
        for bits in 1..=32 {
            for n in 0..70 {
                let mask = u32::MAX >> (32 - bits);
                let field: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(0x9e37_79b9) & mask).collect();
                let mut bytes = Vec::new();
                pack_field(&field, bits, &mut bytes, |value| value);
                assert_eq!(bytes.len(), field_bytes(n, bits));
                let mut back = vec![7; n];
                unpack_field(&bytes, bits, &mut back);
                assert_eq!(back, field, "{bits} bits, {n} weights");
            }
        }
    }
}
