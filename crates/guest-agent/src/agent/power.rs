//! The clock, and the way down.

use super::{Refused, failed, refused};
use crate::message::{Nothing, Shutdown, Time, refusal};
use std::{path::Path, process::Command};

/// Sets the clock; nothing is done within a tenth of a second, which a step would only disturb.
pub(super) fn set_time(time: Time) -> Result<Nothing, Refused> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let difference = i128::from(time.nanoseconds) - now.as_nanos() as i128;
    if difference.abs() > 100_000_000 {
        let (seconds, rest) =
            (time.nanoseconds.div_euclid(1_000_000_000), time.nanoseconds.rem_euclid(1_000_000_000));
        let time = libc::timespec { tv_sec: seconds, tv_nsec: rest };
        // SAFETY: the structure is whole.
        if unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) } < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
    }
    Ok(Nothing {})
}

/// How this system is shut down.
pub(super) enum Plan {
    /// systemd as process 1: a signal starts the target (systemd(1), SIGNALS).
    Signal(i32),
    /// A program.
    Program(&'static str),
}

/// Finds the way; nothing has happened yet.
pub(super) fn plan(how: Shutdown) -> Result<Plan, Refused> {
    if Path::new("/run/systemd/system").is_dir() {
        return Ok(Plan::Signal(libc::SIGRTMIN() + if how.reboot { 5 } else { 4 }));
    }
    let name = if how.reboot { "reboot" } else { "poweroff" };
    let programs = match how.reboot {
        true => ["/sbin/reboot", "/usr/sbin/reboot", "/bin/reboot"],
        false => ["/sbin/poweroff", "/usr/sbin/poweroff", "/bin/poweroff"],
    };
    let found = programs.into_iter().find(|p| Path::new(p).exists());
    found
        .map(Plan::Program)
        .ok_or_else(|| refused(refusal::UNSUPPORTED, "", format!("there is no program {name}")))
}

impl Plan {
    /// Goes it.
    pub(super) fn carry_out(self) -> Result<(), Refused> {
        match self {
            Self::Signal(n) => {
                // SAFETY: plain call.
                if unsafe { libc::kill(1, n) } < 0 {
                    return Err(failed(std::io::Error::last_os_error()));
                }
                Ok(())
            }
            Self::Program(p) => {
                let status = Command::new(p).status().map_err(failed)?;
                if status.success() { Ok(()) } else { Err(refused(refusal::FAILED, "", status)) }
            }
        }
    }
}
