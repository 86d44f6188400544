//! What guests used over time: a file of fixed size for each, in the guest's directory, so that it goes with the guest.
//!
//! The file is rings of slots, a ring for each of [`PERIODS`]. Each slot says itself of when it is and carries a sum of its
//! bytes, and where it lies follows from the time: there is no head to keep, so a crash at any moment loses the minute that
//! was not over, and what a power cut has torn is left out. Nothing is synced: these are figures, not records.

use crate::{RealAgent, agent::blocking};
use karst_env::{Env, Mutex};
use karst_model::{
    InstanceId, Result,
    guest::Metrics,
    history::{self, Meter, PERIODS, Period, Point, Series},
};
use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

/// Name of the file in a guest's directory.
const FILE: &str = "history";
/// Bytes of a slot; it never lies across a boundary of pages.
const SLOT: usize = 64;
/// Figures of a point.
const FIGURES: usize = 6;

/// Makes minutes of the samples that are taken anyway.
#[derive(Debug, Default)]
pub(crate) struct History {
    meters: Mutex<HashMap<InstanceId, Meter>>,
}

impl History {
    fn meters(&self) -> std::sync::MutexGuard<'_, HashMap<InstanceId, Meter>> {
        self.meters.lock()
    }

    /// Takes a sample; answers the minute that is over with it.
    pub(crate) fn take(&self, env: &dyn Env, id: InstanceId, sample: &Metrics) -> Option<Point> {
        self.meters().entry(id).or_default().take(env.monotonic(), env.now().as_second(), sample)
    }

    /// Forgets guests that are gone.
    fn keep(&self, known: impl Fn(InstanceId) -> bool) {
        self.meters().retain(|id, _| known(*id));
    }
}

impl RealAgent {
    fn history_file(&self, id: InstanceId) -> PathBuf {
        self.registry.guest_dir(id).join(FILE)
    }

    /// Writes minutes that are over. What cannot be written is lost and said.
    pub(crate) async fn write_minutes(&self, minutes: Vec<(InstanceId, Point)>) {
        if minutes.is_empty() {
            return;
        }
        let files: Vec<_> = minutes.into_iter().map(|(id, p)| (id, self.history_file(id), p)).collect();
        let written = blocking(move || {
            for (id, file, point) in files {
                match write(&file, &point) {
                    // The guest is gone.
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => {
                        tracing::warn!(instance = %id, error = %e, "what a guest used could not be written down");
                    }
                    Ok(()) => {}
                }
            }
            Ok(())
        });
        if let Err(e) = written.await {
            tracing::warn!(error = %e, "what guests used could not be written down");
        }
    }

    /// What a guest used; series without points of one that never ran here.
    pub(crate) async fn history_of(&self, id: InstanceId) -> Result<Vec<Series>> {
        let file = self.history_file(id);
        let open = self.history.meters().get(&id).and_then(|m| m.open().copied());
        let known = self.guest(id).is_some();
        let now = self.env.now().as_second();
        blocking(move || {
            let mut all = match known {
                true => read(&file, now)?,
                false => history::empty(),
            };
            if let Some(open) = open.filter(|_| known) {
                history::note(&mut all, &open, now);
            }
            Ok(all)
        })
        .await
    }
}

/// Samples all guests once a minute, until the agent ends: whatever else is asked for, each minute has its figures.
pub(crate) async fn watch(agent: Weak<RealAgent>) {
    loop {
        let Some(env) = agent.upgrade().map(|a| a.env.clone()) else { return };
        let step = i64::from(PERIODS[0].seconds);
        let left = step - env.now().as_second().rem_euclid(step);
        env.sleep(Duration::from_secs(left.unsigned_abs())).await;
        let Some(agent) = agent.upgrade() else { return };
        agent.history.keep(|id| agent.guest(id).is_some());
        if let Err(e) = agent.metrics(vec![], false).await {
            tracing::debug!(error = %e, "guests could not be sampled");
        }
        // The clock may stand a little before the minute still.
        let env = agent.env.clone();
        drop(agent);
        env.sleep(Duration::from_secs(1)).await;
    }
}

/// FNV-1a: enough to tell what is whole from what is torn.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, b| (sum ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

/// Time, how much was measured, which figures there are, the figures, the sum.
fn encode(point: &Point) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    let figures = point.figures();
    let there = figures.iter().enumerate().fold(0u8, |set, (n, f)| set | u8::from(f.is_some()) << n);
    slot[0..8].copy_from_slice(&point.time.to_le_bytes());
    // At most an hour: three bytes would do.
    slot[8..11].copy_from_slice(&point.measured_ms.min(0x00ff_ffff).to_le_bytes()[..3]);
    slot[11] = there;
    for (n, figure) in figures.iter().enumerate() {
        slot[12 + 8 * n..20 + 8 * n].copy_from_slice(&figure.unwrap_or_default().to_le_bytes());
    }
    let end = 12 + 8 * FIGURES;
    let sum = sum(&slot[..end]);
    slot[end..end + 4].copy_from_slice(&sum.to_le_bytes());
    slot
}

/// `None` of a slot that was never written, or is torn.
fn decode(slot: &[u8; SLOT]) -> Option<Point> {
    let end = 12 + 8 * FIGURES;
    let word = |at: usize| -> [u8; 8] { std::array::from_fn(|n| slot[at + n]) };
    if slot[end..end + 4] != sum(&slot[..end]).to_le_bytes() {
        return None;
    }
    let figure = |n: usize| (slot[11] & (1 << n) != 0).then(|| u64::from_le_bytes(word(12 + 8 * n)));
    let point = Point {
        time: i64::from_le_bytes(word(0)),
        measured_ms: u32::from_le_bytes([slot[8], slot[9], slot[10], 0]),
        ..Point::default()
    };
    Some(point.with_figures(std::array::from_fn(figure)))
}

/// Where the slot of a period lies in the file.
fn place(ring: usize, period: Period, start: i64) -> u64 {
    let before: u32 = PERIODS[..ring].iter().map(|p| p.kept).sum();
    let index = (start / i64::from(period.seconds)).rem_euclid(i64::from(period.kept));
    (u64::from(before) + index.unsigned_abs()) * SLOT as u64
}

fn slot_at(file: &File, at: u64) -> io::Result<Option<Point>> {
    let mut slot = [0; SLOT];
    match file.read_exact_at(&mut slot, at) {
        // The file ends before: never written.
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(None),
        other => other.map(|()| decode(&slot)),
    }
}

/// Puts a minute into all rings.
fn write(path: &Path, minute: &Point) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    for (ring, period) in PERIODS.into_iter().enumerate() {
        let point = Point { time: period.of(minute.time), ..*minute };
        let at = place(ring, period, point.time);
        let there = slot_at(&file, at)?.filter(|p| p.time == point.time);
        let point = there.map_or(point, |p| p.and(&point));
        file.write_all_at(&encode(&point), at)?;
    }
    Ok(())
}

/// All that is kept at `now`.
fn read(path: &Path, now: i64) -> Result<Vec<Series>> {
    let bytes = match std::fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(history::empty()),
        other => other?,
    };
    let mut slots = bytes.as_chunks::<SLOT>().0.iter();
    let mut all = history::empty();
    for (series, period) in all.iter_mut().zip(PERIODS) {
        let ring = slots.by_ref().take(period.kept as usize);
        series.points = ring.filter_map(decode).filter(|p| period.keeps(p.time, now)).collect();
        series.points.sort_by_key(|p| p.time);
    }
    Ok(all)
}

/// Where [`watch`] is started.
pub(crate) fn spawn(agent: &Arc<RealAgent>) {
    tokio::spawn(watch(Arc::downgrade(agent)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minute(n: i64) -> Point {
        let figures = [Some(500), Some(1 << 30), None, Some(n.unsigned_abs()), Some(u64::MAX), Some(0)];
        Point { time: 1_700_000_400 + 60 * n, measured_ms: 60_000, ..Point::default() }.with_figures(figures)
    }

    #[test]
    fn a_file_is_as_the_series_in_memory_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut kept = history::empty();
        assert_eq!(read(&path, 0).unwrap(), kept);
        // Two days, with a gap, and a minute that comes twice as after a restart.
        for n in (0..1000).chain(1300..2880).chain([2879]) {
            write(&path, &minute(n)).unwrap();
            history::note(&mut kept, &minute(n), minute(n).time);
        }
        let now = minute(2879).time + 59;
        assert_eq!(read(&path, now).unwrap(), kept);
        assert!(kept.iter().all(|s| s.points.len() > 40), "{kept:?}");
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(size <= SLOT as u64 * PERIODS.iter().map(|p| u64::from(p.kept)).sum::<u64>(), "{size}");
        // Much later nothing of it counts, though it is there still.
        assert_eq!(read(&path, now + 40 * 86_400).unwrap(), history::empty());
    }

    #[test]
    fn what_is_torn_is_left_out_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        write(&path, &minute(0)).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let at = place(0, PERIODS[0], minute(0).time);
        file.write_all_at(&[7; 20], at + 30).unwrap();
        let found = read(&path, minute(0).time).unwrap();
        assert_eq!(found.iter().map(|s| s.points.len()).collect::<Vec<_>>(), [0, 1, 1]);
        write(&path, &minute(0)).unwrap();
        let found = read(&path, minute(0).time).unwrap();
        assert_eq!(found[0].points, [minute(0)]);
        // Cut in the middle of a slot, as by a full disk.
        file.set_len(at + 10).unwrap();
        assert!(read(&path, minute(0).time).unwrap().iter().all(|s| s.points.is_empty()));
        assert_eq!(decode(&[0; SLOT]), None);
    }

    #[test]
    fn a_guest_that_is_gone_gets_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let gone = write(&dir.path().join("gone").join(FILE), &minute(0)).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }
}
