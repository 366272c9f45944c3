//! Planes of 4, 2 or 1 bits a weight to bytes: a plane's byte is spread over a lane of 2, 4 or 8 bytes by shifting copies of
//! it, which compilers turn into vectors.

/// Adds the nibbles of `bytes`, each shifted left by `shift`, to the bytes of `out`.
#[inline(always)]
pub(super) fn spread4(bytes: &[u8], out: &mut [u8], shift: u32) {
    for (out, &b) in out.as_chunks_mut().0.iter_mut().zip(bytes) {
        let b = u16::from(b);
        *out = (u16::from_le_bytes(*out) | ((b | b << 4) & 0x0f0f) << shift).to_le_bytes();
    }
}

/// As [`spread4`], with pairs of bits.
#[inline(always)]
pub(super) fn spread2(bytes: &[u8], out: &mut [u8], shift: u32) {
    for (out, &b) in out.as_chunks_mut().0.iter_mut().zip(bytes) {
        let b = u32::from(b);
        let spread = (b | b << 6 | b << 12 | b << 18) & 0x0303_0303;
        *out = (u32::from_le_bytes(*out) | spread << shift).to_le_bytes();
    }
}

/// As [`spread4`], with single bits.
#[inline(always)]
pub(super) fn spread1(bytes: &[u8], out: &mut [u8], shift: u32) {
    for (out, &b) in out.as_chunks_mut().0.iter_mut().zip(bytes) {
        let b = u64::from(b) | u64::from(b) << 7;
        let b = b | b << 14;
        *out = (u64::from_le_bytes(*out) | ((b | b << 28) & 0x0101_0101_0101_0101) << shift).to_le_bytes();
    }
}

/// Calls `each` with the places of `value` in `bytes`, whose number is a multiple of 8, in order.
#[inline(always)]
pub(super) fn find(bytes: &[u8], value: u8, mut each: impl FnMut(usize)) {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    for (at, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
        let differ = u64::from_le_bytes(*bytes) ^ u64::from_le_bytes([value; 8]);
        // The top bit of each byte that is zero now.
        let mut found = !(((differ & LOW) + LOW) | differ) & !LOW;
        while found != 0 {
            each(8 * at + found.trailing_zeros() as usize / 8);
            found &= found - 1;
        }
    }
}
