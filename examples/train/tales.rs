//! Little tales for children from a hand-written grammar.
//!
//! A tale is an opening, one of the stories in [`phrases`](super::phrases), and an ending. Names, animals, things and
//! places are drawn once and stay the same in it. One story alone, the lost toy, has more than 10^12 tellings.

use std::collections::HashMap;

use super::phrases::*;

/// SplitMix64: small, and the same everywhere.
pub struct Rng(pub u64);

impl Rng {
    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// A number in 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Two different ones of several.
    fn pair(&mut self, of: &[&'static str]) -> (&'static str, &'static str) {
        let first = self.below(of.len());
        let second = (first + 1 + self.below(of.len() - 1)) % of.len();
        (of[first], of[second])
    }
}

/// The words drawn for one tale.
type Words = HashMap<&'static str, String>;

/// he, him, his or she, her, her.
fn pronouns(female: bool) -> [&'static str; 3] {
    if female { ["she", "her", "her"] } else { ["he", "him", "his"] }
}

fn people(rng: &mut Rng, words: &mut Words) {
    let (female, friend_female) = (rng.below(2) == 0, rng.below(2) == 0);
    let small = rng.pick(SMALL);
    let (hero, friend, kind, friend_kind, introduced);
    if rng.below(3) == 0 {
        (hero, friend) = rng.pair(PETS);
        let (own, other) = rng.pair(SPECIES);
        kind = format!("{small} {own}");
        friend_kind = format!("{} {other}", rng.pick(SMALL));
        introduced = format!("{friend} the {other}");
        words.insert("hand", "paw".into());
    } else {
        let (first, second) = (if female { GIRLS } else { BOYS }, if friend_female { GIRLS } else { BOYS });
        hero = rng.pick(first);
        friend = loop {
            let name = rng.pick(second);
            if name != hero {
                break name;
            }
        };
        kind = format!("{small} {}", if female { "girl" } else { "boy" });
        friend_kind = format!("{} {}", rng.pick(SMALL), if friend_female { "girl" } else { "boy" });
        introduced = friend.to_string();
        words.insert("hand", "hand".into());
    }
    let (parent, parent_female) = rng.pick(PARENTS);
    let [he, him, his] = pronouns(female);
    let [fhe, fhim, fhis] = pronouns(friend_female);
    let [phe, phim, phis] = pronouns(parent_female);
    words.extend([
        ("hero", hero.into()),
        ("friend", friend.into()),
        ("friend1", introduced),
        ("kind", kind),
        ("fkind", friend_kind),
        ("parent", parent.into()),
        ("he", he.into()),
        ("him", him.into()),
        ("his", his.into()),
        ("fhe", fhe.into()),
        ("fhim", fhim.into()),
        ("fhis", fhis.into()),
        ("phe", phe.into()),
        ("phim", phim.into()),
        ("phis", phis.into()),
    ]);
}

fn things(rng: &mut Rng, words: &mut Words) {
    let (toy, color, beast) = (rng.pick(TOYS), rng.pick(COLORS), rng.pick(BEASTS));
    let (food, foods) = rng.pick(FOODS);
    let (to, at, place) = rng.pick(PLACES);
    let (spot, spot2) = rng.pair(SPOTS);
    let (weather, sentences) = rng.pick(WEATHERS);
    words.extend([
        ("toy", toy.into()),
        ("color", color.into()),
        ("thing", format!("{color} {toy}")),
        ("thing2", rng.pick(CHESTS).into()),
        ("vase", rng.pick(VASES).into()),
        ("beast", beast.into()),
        ("animal", format!("{} {beast}", rng.pick(SIZES))),
        ("food", food.into()),
        ("foods", foods.into()),
        ("to", to.into()),
        ("at", at.into()),
        ("place", place.into()),
        ("spot", spot.into()),
        ("spot2", spot2.into()),
        ("day", format!("one {weather} {}", rng.pick(TIMES))),
        ("weather", rng.pick(sentences).into()),
        ("home", rng.pick(HOMES).into()),
        ("hobby", rng.pick(HOBBIES).into()),
        ("skill", rng.pick(SKILLS).into()),
    ]);
}

/// The word for a key such as `hero`, `Hero` or `a thing`.
fn look_up(key: &str, words: &Words) -> String {
    let (article, key) = match key.split_once(' ') {
        Some(("a", key)) => (true, key),
        _ => (false, key),
    };
    let capital = key.starts_with(char::is_uppercase);
    let word = words.get(key.to_lowercase().as_str()).unwrap_or_else(|| panic!("no word for {key}"));
    let mut text = String::new();
    if article {
        text.push_str(if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an " } else { "a " });
    }
    let mut rest = word.chars();
    if capital {
        text.extend(rest.next().map(|first| first.to_ascii_uppercase()));
    }
    text.extend(rest);
    text
}

/// The sentence with all choices made and all words filled in.
fn expand(template: &str, rng: &mut Rng, words: &Words) -> String {
    let (mut text, mut rest) = (String::new(), template);
    while let Some(at) = rest.find(['{', '[']) {
        text.push_str(&rest[..at]);
        let close = if rest[at..].starts_with('{') { '}' } else { ']' };
        let end = at + rest[at..].find(close).expect("a bracket is closed");
        let inner = &rest[at + 1..end];
        if close == '}' {
            text.push_str(&look_up(inner, words));
        } else {
            let choices: Vec<&str> = inner.split('|').collect();
            text.push_str(rng.pick(&choices));
        }
        rest = &rest[end + 1..];
    }
    text + rest
}

/// One tale.
pub fn tale(rng: &mut Rng) -> String {
    let mut words = Words::new();
    people(rng, &mut words);
    things(rng, &mut words);
    let arc = rng.pick(ARCS);
    let mut sentences = vec![rng.pick(OPENINGS), rng.pick(TRAITS)];
    sentences.extend(arc.iter().map(|wordings| rng.pick(wordings)));
    sentences.push(rng.pick(ENDINGS));
    let mut text = String::new();
    let mut known = false;
    for template in sentences {
        // The friend's first mention says what it is, unless the sentence does.
        let introduces = !known && !template.contains("{fkind}");
        let template = if introduces { template.replacen("riend}", "riend1}", 1) } else { template.to_string() };
        known |= template.contains("riend1}") || template.contains("{fkind}");
        let sentence = expand(&template, rng, &words);
        if !text.is_empty() && !sentence.is_empty() {
            text.push(' ');
        }
        text.push_str(&sentence);
    }
    text
}

/// Tales from a seed.
pub fn tales(seed: u64, count: usize) -> Vec<String> {
    let mut rng = Rng(seed);
    (0..count).map(|_| tale(&mut rng)).collect()
}
