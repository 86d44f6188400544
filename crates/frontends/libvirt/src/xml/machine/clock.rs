//! What a `<clock>` says beside UTC, local time and timers, both ways.

use super::wrong;
use crate::{error::VirError, xml::Element};
use karst_model::board::{Board, is_zone};

/// What a `<clock>` says beside UTC, local time and timers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clock {
    /// What it begins with.
    pub start: Option<u64>,
    /// Its time zone.
    pub zone: Option<String>,
    /// It goes on with the host's, whatever becomes of the machine.
    pub real: bool,
}

impl Clock {
    /// What a board has of it.
    pub fn of(board: &Board) -> Self {
        let real = board.features.is_some_and(|f| f.real_time_clock);
        Self { start: board.clock_start, zone: board.clock_zone.clone(), real }
    }
}

/// What a `<clock>` says of it.
///
/// # Errors
/// XML error for a beginning or a time zone that is none.
pub fn clock(e: &Element) -> Result<Clock, VirError> {
    let start = match e.attribute("offset") {
        Some("absolute") => {
            let text = e.attribute("start").unwrap_or_default();
            let seconds = text.parse().ok().filter(|n| *n < 253_402_300_800u64);
            Some(seconds.ok_or_else(|| wrong(format!("invalid value '{text}' of start in <clock>")))?)
        }
        _ => None,
    };
    let real = |t: &Element| t.attribute("name") == Some("rtc") && t.attribute("track") == Some("realtime");
    let zone = match e.attribute("offset") {
        Some("timezone") => {
            let text = e.attribute("timezone").unwrap_or_default();
            let zone = Some(text).filter(|z| is_zone(z)).map(str::to_owned);
            Some(zone.ok_or_else(|| wrong(format!("invalid value '{text}' of timezone in <clock>")))?)
        }
        _ => None,
    };
    Ok(Clock { start, zone, real: e.all("timer").any(real) })
}

/// Says it in a `<clock>` that says nothing of it.
pub fn show_clock(e: &mut Element, all: &Clock) {
    if let Some(zone) = &all.zone {
        e.set("offset", "timezone");
        e.set("timezone", zone);
    }
    if let Some(seconds) = all.start {
        e.set("offset", "absolute");
        e.set("start", seconds);
    }
    if all.real {
        e.push(Element::new("timer").with("name", "rtc").with("track", "realtime"));
    }
}

/// Does the clock of a machine have an HPET?
pub fn hpet(clock: &Element) -> bool {
    clock.all("timer").any(|t| t.attribute("name") == Some("hpet") && t.attribute("present") == Some("yes"))
}
