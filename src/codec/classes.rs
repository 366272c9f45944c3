//! Classes: small numbers for the commonest high parts.

/// Which high part each class stands for.
///
/// With 3- and 4-bit classes of float kinds the last class is the escape; the 16 exponents of E4M3 and the 16 high
/// nibbles of INT8 fill 4-bit classes completely and need none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassMap {
    /// The high part of each class; unused entries and the escape's own are 0.
    pub values: [u8; 16],
    /// The class that announces an entry in the escape list.
    pub escape: Option<u8>,
}

impl ClassMap {
    /// Class `c` stands for high part `c`.
    pub fn identity(escape: Option<u8>) -> ClassMap {
        let mut values = std::array::from_fn(|c| c as u8);
        if let Some(e) = escape {
            values[e as usize % 16] = 0;
        }
        ClassMap { values, escape }
    }

    /// The map with `2^bits − 1` classes for the commonest high parts, in descending order of count (lower high part
    /// first among equals), and an escape.
    pub fn commonest(counts: &[u64; 256], bits: u32) -> ClassMap {
        let mut order: Vec<u8> = (0..=255).collect();
        order.sort_by_key(|&h| (std::cmp::Reverse(counts[h as usize]), h));
        let escape = (1u8 << bits) - 1;
        let mut values = [0; 16];
        for (value, &high) in values.iter_mut().zip(&order[..escape as usize]) {
            *value = if counts[high as usize] > 0 { high } else { 0 };
        }
        ClassMap { values, escape: Some(escape) }
    }

    /// For each high part its class, the escape class for those without one.
    pub fn lookup(&self, bits: u32) -> [u8; 256] {
        let mut table = [self.escape.unwrap_or(0); 256];
        let classes = self.escape.map_or(1 << bits.min(4), |e| e as usize);
        for class in (0..classes).rev() {
            table[self.values[class] as usize] = class as u8;
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commonest_high_parts_get_the_lowest_classes() {
        let mut counts = [0u64; 256];
        for (h, c) in [(120, 5), (121, 50), (119, 5), (7, 1)] {
            counts[h] = c;
        }
        let map = ClassMap::commonest(&counts, 3);
        assert_eq!(&map.values[..8], &[121, 119, 120, 7, 0, 0, 0, 0]);
        let lookup = map.lookup(3);
        assert_eq!((lookup[121], lookup[119], lookup[7]), (0, 1, 3));
        assert_eq!(lookup[200], 7, "escape");
    }
}
