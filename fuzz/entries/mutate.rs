//! Mutations of known inputs by a seed: the same seed gives the same inputs, on every machine. No coverage guides it, so the
//! inputs that it begins with have to reach what is to be tried; cargo-fuzz goes further.

/// Numbers at which lengths, counts and kinds go wrong.
const NUMBERS: [u32; 14] =
    [0, 1, 2, 3, 4, 7, 27, 28, 0xff, 0x7fff, 0x10000, 0x0040_0001, 0x7fff_ffff, 0xffff_ffff];

/// Where inputs come from.
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// By a seed.
    pub fn new(seed: u64) -> Self {
        // A state of zero would stay zero.
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// The next number (xorshift64*, Vigna 2014).
    pub fn number(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }

    /// One of the inputs, changed in a few places; at most `most` bytes.
    pub fn mutated(&mut self, seeds: &[Vec<u8>], most: usize) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..1 + self.below(6) {
            let donor = &seeds[self.below(seeds.len())];
            self.change(&mut input, donor);
        }
        input.truncate(most);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, donor: &[u8]) {
        let at = self.below(input.len());
        match self.below(9) {
            0 if !input.is_empty() => input[at] ^= 1 << self.below(8),
            1 if !input.is_empty() => input[at] = self.number() as u8,
            2 => input.truncate(at),
            3 => {
                let end = (at + self.below(16)).min(input.len());
                drop(input.drain(at..end));
            }
            4 => {
                let end = (at + self.below(64)).min(input.len());
                let again = input[at..end].to_vec();
                input.splice(at..at, again);
            }
            // A number in either order of bytes, where numbers of protocols stand.
            5 if input.len() >= 4 => {
                let at = self.below(input.len() - 3) & !3;
                let n = NUMBERS[self.below(NUMBERS.len())];
                let bytes = if self.below(2) == 0 { n.to_be_bytes() } else { n.to_le_bytes() };
                input[at..at + 4].copy_from_slice(&bytes);
            }
            6 => {
                let from = self.below(donor.len());
                let end = (from + self.below(128)).min(donor.len());
                input.splice(at..at, donor[from..end].iter().copied());
            }
            // Elements of one document into another.
            7 => {
                let tags = |bytes: &[u8]| -> Vec<usize> {
                    bytes.iter().enumerate().filter(|(_, b)| **b == b'<').map(|(n, _)| n).collect()
                };
                let (here, there) = (tags(input), tags(donor));
                if here.is_empty() || there.is_empty() {
                    return;
                }
                let (to, from) = (here[self.below(here.len())], self.below(there.len()));
                let last = from + 1 + self.below(4);
                let end = there.get(last).copied().unwrap_or(donor.len());
                input.splice(to..to, donor[there[from]..end].iter().copied());
            }
            _ => {
                let more = 1 + self.below(8);
                let bytes: Vec<u8> = (0..more).map(|_| self.number() as u8).collect();
                input.splice(at..at, bytes);
            }
        }
    }
}
