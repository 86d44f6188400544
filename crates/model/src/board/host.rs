//! What QEMU's own process has for a machine: threads of its main one, and the graphics card that draws its screens.

use super::wrong;
use crate::Result;

pub(super) const MAIN_POOL: &str = "hardware.main_thread.pool";
pub(super) const RENDER: &str = "hardware.video.render";
/// The host chooses the graphics card.
pub const AUTO_RENDER: &str = "auto";

/// `8-16`, `8-` or `-16`.
pub(super) fn main_pool(text: &str) -> Result<(Option<u32>, Option<u32>)> {
    let odd = || {
        let why = "write how many threads are kept and how many there are at most, up to 65535, as in 8-16, 8- or -16";
        wrong(MAIN_POOL, format!("{text:?}: {why}"))
    };
    let (least, most) = text.split_once('-').ok_or_else(odd)?;
    let of = |part: &str| match part {
        "" => Ok(None),
        part => part.parse().ok().filter(|n: &u32| *n < 65_536).map(Some).ok_or_else(odd),
    };
    match (of(least)?, of(most)?) {
        (None, None) | (_, Some(0)) => Err(odd()),
        // Without a word QEMU has 64 at most.
        (Some(least), most) if least > most.unwrap_or(64) => Err(odd()),
        found => Ok(found),
    }
}

pub(super) fn main_pool_text((least, most): (Option<u32>, Option<u32>)) -> String {
    let of = |n: Option<u32>| n.map(|n| n.to_string()).unwrap_or_default();
    format!("{}-{}", of(least), of(most))
}

/// The name of a render node, or of none in particular.
pub(super) fn render(text: &str) -> Result<String> {
    let name = text.strip_prefix("/dev/dri/");
    let good = name.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric()));
    match good || text == AUTO_RENDER {
        true => Ok(text.to_owned()),
        false => {
            Err(wrong(RENDER, format!("{text:?}: write auto, or a render node such as /dev/dri/renderD128")))
        }
    }
}
