//! Bands made up directly, so that no parser stands before the decoders: sections of wrong lengths, words that run out,
//! escapes without entries, tables of every form.

use super::golden::Random;
use candle_taper::codec::band::{self, Band, BandBytes, BandCodes};
use candle_taper::codec::quant::Scales;
use candle_taper::codec::{
    Coding, DecodeTable, Dtype, EncodeTable, FreqTable, Kind, Plan, Predictor, ScaleLayout, Scratch, planes,
};

const KINDS: [Kind; 7] = [Kind::Bf16, Kind::F16, Kind::F32, Kind::F8E4M3, Kind::F8E5M2, Kind::Int8, Kind::Rate];
const DTYPES: [Dtype; 6] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F8E4M3, Dtype::F8E5M2, Dtype::I8];
const LAYOUTS: [ScaleLayout; 5] =
    [ScaleLayout::None, ScaleLayout::Matrix, ScaleLayout::Row, ScaleLayout::Tile, ScaleLayout::Levels];

/// Every combination that a header may announce.
pub fn plans() -> Vec<Plan> {
    let mut plans = Vec::new();
    for (kind, dtype) in KINDS.into_iter().flat_map(|kind| DTYPES.map(|dtype| (kind, dtype))) {
        for (class_bits, coding) in [0, 3, 4, 8].into_iter().flat_map(|b| [(b, Coding::Plain), (b, Coding::Rans)]) {
            for layout in LAYOUTS {
                let plan = Plan::new(kind, dtype, class_bits, coding, layout);
                let raw_bits = if kind == Kind::Rate { 0..=7 } else { plan.raw_bits..=plan.raw_bits };
                plans.extend(raw_bits.map(|raw_bits| Plan { raw_bits, ..plan.clone() }));
            }
        }
    }
    plans.retain(|plan| plan.validate().is_ok());
    plans
}

/// A frequency table in both forms.
pub struct Table {
    encode: EncodeTable,
    decode: DecodeTable,
    /// True if every symbol can be coded.
    complete: bool,
}

/// Flat, skewed, sparse and one-sided tables; the first of them complete.
pub fn tables() -> Vec<Table> {
    let mut random = Random(77);
    let mut tables = Vec::new();
    for i in 0..48 {
        let mut counts = [u64::from(i < 16); 256];
        for _ in 0..[0, 1, 2, 3, 16, 200][i % 6] {
            counts[random.below(256)] += 1 << random.below(24);
        }
        if i % 5 == 4 {
            // Escapes everywhere: the last class of each width, and pairs of it.
            [7, 15, 255].into_iter().for_each(|s: usize| counts[s] += 1 << 20);
        }
        let freqs = FreqTable::from_counts(&counts);
        let complete = freqs.0.iter().all(|&f| f > 0);
        tables.push(Table { encode: EncodeTable::new(&freqs), decode: DecodeTable::new(&freqs), complete });
    }
    tables
}

/// The bytes of a band, in buffers of just their size so that sanitizers see every byte read too much.
pub struct Sections {
    coded: Box<[u8]>,
    raw: Box<[u8]>,
    escapes: Box<[u8]>,
    scales: Box<[u8]>,
    /// True if the encoder made them and nothing was damaged.
    pub valid: bool,
}

/// Bytes as they might be: random, or all alike so that everything or nothing escapes.
fn noise(random: &mut Random, n: usize) -> Vec<u8> {
    match random.below(4) {
        0 => vec![[0, 255, 0x77][random.below(3)]; n],
        _ => random.bytes(n),
    }
}

/// A length near the right one, or far from it.
fn length(random: &mut Random, right: usize) -> usize {
    match random.below(8) {
        0 => 0,
        1 => random.below(right + 1),
        2 => right + 1 + random.below(70),
        3 => right.saturating_sub(1 + random.below(5)),
        4 => 2 * right,
        _ => right,
    }
}

fn made_up(plan: &Plan, n: usize, random: &mut Random) -> Sections {
    let coded = match plan.coding {
        Coding::Plain => length(random, planes::field_bytes(n, plan.class_bits)),
        Coding::Rans => {
            let words = random.below(n + 40);
            length(random, 128 + 2 * words)
        }
    };
    let escapes = n * if plan.kind == Kind::Rate { 4 } else { 1 };
    let escapes = random.below(escapes + 1);
    let raw = length(random, planes::field_bytes(n, plan.raw_bits));
    let escapes = length(random, escapes);
    let mut section = |n| noise(random, n).into_boxed_slice();
    Sections { coded: section(coded), raw: section(raw), escapes: section(escapes), scales: [].into(), valid: false }
}

/// What the encoder makes of random weights.
fn encoded(plan: &Plan, table: &Table, n: usize, random: &mut Random) -> Sections {
    // Few different high parts, or many.
    let mask = [0x7fff_ffff, 0x0fff_003f, 0x00ff_8383, 0x1fff][random.below(4)];
    let codes: Vec<u32> = (0..n).map(|_| random.next() as u32 & mask).collect();
    let codes: Vec<u32> = match plan.kind {
        Kind::Rate => codes.iter().map(|&c| (c as i32 % 600 - 300) as u32).collect(),
        _ => codes,
    };
    let values: Vec<f32> = codes.iter().map(|&c| f32::from_bits(c)).collect();
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    let band = BandCodes { codes: &codes, values: &values, shifts: &[] };
    let sizes = band::encode(plan, Some(&table.encode), band, &mut scratch, &mut out).unwrap();
    let mut rest = &out[..];
    let mut section = |n: usize| {
        let (section, after) = rest.split_at(n.next_multiple_of(band::ALIGN));
        rest = after;
        Box::from(&section[..n])
    };
    let coded = section(sizes.coded);
    let raw = section(planes::field_bytes(n, plan.raw_bits));
    let escapes = section(sizes.escapes * if plan.kind == Kind::Rate { 4 } else { 1 });
    Sections { coded, raw, escapes, scales: [].into(), valid: true }
}

/// Changes bytes, or takes or adds some at the end.
fn damage(sections: &mut Sections, random: &mut Random) {
    sections.valid = false;
    let section = match random.below(3) {
        0 => &mut sections.coded,
        1 => &mut sections.raw,
        _ => &mut sections.escapes,
    };
    let mut bytes = section.to_vec();
    match random.below(4) {
        0 => bytes.truncate(random.below(bytes.len() + 1)),
        1 => bytes.truncate(bytes.len().saturating_sub(2)),
        2 => bytes.extend(random.bytes(2)),
        _ if bytes.is_empty() => {}
        _ => (0..1 + random.below(4)).for_each(|_| {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }),
    }
    *section = bytes.into();
}

/// A band of any shape with any bytes.
pub struct Case {
    pub plan: Plan,
    pub table: usize,
    pub rows: usize,
    pub cols: usize,
    pub predictor: Predictor,
    pub sections: Sections,
}

impl Case {
    pub fn new(plans: &[Plan], tables: &[Table], random: &mut Random) -> Case {
        let mut plan = plans[random.below(plans.len())].clone();
        let size = |random: &mut Random, limit| {
            let limit_or_few = [8, limit][random.below(2)];
            if random.one_in(4) { limit } else { 1 + random.below(limit_or_few) }
        };
        let (rows, cols) = (size(random, 64), if random.one_in(3) { 64 << random.below(3) } else { size(random, 256) });
        if matches!(plan.class_bits, 3 | 4) && plan.map.escape.is_some() {
            plan.map.values = std::array::from_fn(|_| random.next() as u8);
        }
        let predictor = if plan.allows_predictor() { Predictor::ALL[random.below(5)] } else { Predictor::None };
        let mut table = random.below(tables.len());
        let mut sections = if random.one_in(2) {
            made_up(&plan, rows * cols, random)
        } else {
            table %= tables.iter().take_while(|table| table.complete).count();
            encoded(&plan, &tables[table], rows * cols, random)
        };
        if sections.valid && random.one_in(2) {
            damage(&mut sections, random);
        }
        let scales = if plan.scale == ScaleLayout::Levels { rows + cols } else { 4 * rows };
        let scales = length(random, scales);
        // Mostly normal numbers; at times NaN, infinite, subnormal.
        sections.scales = random.bytes(scales).into();
        Case { plan, table, rows, cols, predictor, sections }
    }

    pub fn band<'a>(&'a self, tables: &'a [Table]) -> Band<'a> {
        let Sections { coded, raw, escapes, scales, .. } = &self.sections;
        let scales = match self.plan.scale {
            ScaleLayout::None => Scales::None,
            ScaleLayout::Row => Scales::Rows(scales),
            ScaleLayout::Levels => {
                let (rows, cols) = scales.split_at(self.rows.min(scales.len()));
                Scales::Levels { rows, cols }
            }
            _ => Scales::One(scales.first_chunk().map_or(0.5, |b| f32::from_le_bytes(*b))),
        };
        let (plan, table, predictor) = (&self.plan, &tables[self.table].decode, self.predictor);
        Band {
            plan,
            table,
            bytes: BandBytes { coded, raw, escapes },
            predictor,
            scales,
            rows: self.rows,
            cols: self.cols,
        }
    }

    pub fn row_bytes(&self) -> usize {
        self.cols * self.plan.value_bytes()
    }

    pub fn name(&self) -> String {
        let Sections { coded, raw, escapes, valid, .. } = &self.sections;
        let Case { plan, rows, cols, predictor, .. } = self;
        let bytes = [coded, raw, escapes].map(|section| section.len());
        format!("{plan:?} {rows}x{cols} {predictor:?}, table {}, bytes {bytes:?}, valid {valid}", self.table)
    }
}
