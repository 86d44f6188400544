//! File systems made consistent and still, for as long as a snapshot takes.
//!
//! Who froze may die, and a system whose disks stay frozen is lost. So a thread thaws when the time is over, whatever
//! happens meanwhile; it is there before anything is frozen, because afterwards even that could wait for a disk.

use super::{Refused, facts, failed, refused};
use crate::message::{Freeze, Frozen, MAX_FREEZE, refusal};
use std::{
    fs::File,
    os::fd::AsRawFd,
    sync::{Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

// linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: libc::c_ulong = 0xc004_5877;
const FITHAW: libc::c_ulong = 0xc004_5878;

#[derive(Debug, Default)]
struct State {
    /// Roots of what is frozen, in the order of freezing.
    frozen: Vec<File>,
    until: Option<Instant>,
    /// The time was over before anybody thawed.
    expired: bool,
    watched: bool,
}

static STATE: Mutex<State> =
    Mutex::new(State { frozen: vec![], until: None, expired: false, watched: false });
static CHANGED: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Something is frozen.
pub(super) fn is_frozen() -> bool {
    // A freeze that goes on right now may itself wait for a disk.
    STATE.try_lock().map_or(true, |s| !s.frozen.is_empty())
}

fn control(root: &File, request: libc::c_ulong) -> std::io::Result<()> {
    // SAFETY: the argument is not used by the kernel.
    match unsafe { libc::ioctl(root.as_raw_fd(), request as _, 0) } {
        0.. => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// In the reverse order of freezing; what somebody else thawed already is fine.
fn thaw_all(frozen: &mut Vec<File>) -> u32 {
    let mut count = 0;
    while let Some(root) = frozen.pop() {
        count += u32::from(control(&root, FITHAW).is_ok());
    }
    count
}

fn watch() {
    let mut state = lock();
    loop {
        state = match state.until {
            None => CHANGED.wait(state).unwrap_or_else(|e| e.into_inner()),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    thaw_all(&mut state.frozen);
                    state.until = None;
                    state.expired = true;
                    state
                } else {
                    CHANGED.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0
                }
            }
        };
    }
}

/// Freezes every file system on a device that can be: all or none.
pub(super) fn freeze(how: Freeze) -> Result<Frozen, Refused> {
    if how.limit == 0 || how.limit > MAX_FREEZE {
        return Err(refused(refusal::INVALID, "limit", format!("1 to {MAX_FREEZE} milliseconds")));
    }
    let mut state = lock();
    if !state.frozen.is_empty() {
        return Err(refused(refusal::BUSY, "", "the file systems are frozen already"));
    }
    if !state.watched {
        std::thread::Builder::new().stack_size(super::STACK).spawn(watch).map_err(failed)?;
        state.watched = true;
    }
    // Opened before: finding a root may read a disk.
    let mounts: Vec<_> = facts::mounts().into_iter().filter(|m| m.writable).collect();
    let mut roots = vec![];
    for m in &mounts {
        roots.push(File::open(&m.point).map_err(failed)?);
    }
    state.expired = false;
    state.until = Some(Instant::now() + Duration::from_millis(how.limit.into()));
    CHANGED.notify_all();
    // What was mounted last first: it may lie on a file of one below.
    for (root, mount) in roots.into_iter().zip(&mounts).rev() {
        match control(&root, FIFREEZE) {
            Ok(()) => state.frozen.push(root),
            // It cannot be frozen, or somebody else has frozen it and will thaw it.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EBUSY)) => {}
            Err(e) => {
                thaw_all(&mut state.frozen);
                state.until = None;
                let mut refusal = failed(e);
                refusal.text = format!("{}: {}", mount.point, refusal.text);
                return Err(refusal);
            }
        }
    }
    Ok(Frozen { count: state.frozen.len() as u32, expired: false })
}

/// Thaws what was frozen.
pub(super) fn thaw() -> Result<Frozen, Refused> {
    let mut state = lock();
    state.until = None;
    let expired = std::mem::take(&mut state.expired);
    Ok(Frozen { count: thaw_all(&mut state.frozen), expired })
}
