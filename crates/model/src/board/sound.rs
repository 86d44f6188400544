//! What the sound cards of a machine that are of high definition have: their codecs.

use super::{Sound, number, wrong};
use crate::Result;
use serde::{Deserialize, Serialize};

pub(super) const CODECS: &str = "hardware.sound.codecs";

words!(
    /// What a codec of a sound card has.
    SoundCodec, SOUND_CODECS {
        /// Lines in and out.
        Duplex = "duplex",
        /// A microphone and a speaker.
        Micro = "micro",
        /// Lines out.
        Output = "output",
    }
);

/// Codecs of one card at most: what a bus has addresses for.
const MOST: usize = 15;

/// `1=micro+duplex;3=output`: by the place of the card in `hardware.sound`.
pub(super) fn codecs(text: &str, cards: &[Sound]) -> Result<Vec<(u32, Vec<SoundCodec>)>> {
    let mut all: Vec<(u32, Vec<SoundCodec>)> = vec![];
    for part in text.split(';') {
        let odd = || {
            wrong(
                CODECS,
                format!(
                    "{part:?}: write a card's place in hardware.sound and its codecs, as in 0=micro+output"
                ),
            )
        };
        let (card, words) = part.trim().split_once('=').ok_or_else(odd)?;
        let card = number(CODECS, card)?;
        if !matches!(cards.get(card as usize), Some(Sound::Ich6 | Sound::Ich9)) {
            return Err(wrong(
                CODECS,
                format!("{card} is no card ich6 or ich9 of hardware.sound, numbered from 0"),
            ));
        }
        let words = words
            .split('+')
            .map(|word| super::word(CODECS, word, SOUND_CODECS))
            .collect::<Result<Vec<_>>>()?;
        if words.len() > MOST || all.iter().any(|(known, _)| *known == card) {
            return Err(odd());
        }
        // One that is as usual is not said.
        if words != [SoundCodec::Duplex] {
            all.push((card, words));
        }
    }
    all.sort_by_key(|(card, _)| *card);
    Ok(all)
}

pub(super) fn text(all: &[(u32, Vec<SoundCodec>)]) -> Option<String> {
    let one = |(card, words): &(u32, Vec<SoundCodec>)| {
        format!("{card}={}", words.iter().map(|w| w.as_str()).collect::<Vec<_>>().join("+"))
    };
    (!all.is_empty()).then(|| all.iter().map(one).collect::<Vec<_>>().join(";"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_are_of_cards_that_have_any() {
        let cards = [Sound::Ac97, Sound::Ich6, Sound::Ich9, Sound::Ich9];
        let found = codecs("2=micro+duplex;1=output;3=duplex", &cards).unwrap();
        assert_eq!(text(&found).as_deref(), Some("1=output;2=micro+duplex"));
        for bad in ["0=micro", "4=micro", "1=", "1=loud", "1", "1=micro;1=micro"] {
            assert_eq!(
                codecs(bad, &cards).unwrap_err().field.as_deref(),
                Some("config.hardware.sound.codecs"),
                "{bad}"
            );
        }
    }
}
