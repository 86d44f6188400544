//! Ranges of host user and group ids, 65,536 for each guest and for the image worker.
//!
//! A range is claimed in a directory that all daemons of the machine share (`/run/karst/ids`, gone with the next boot, as
//! everything that uses a range is) before anything uses it: one file a range, made exclusively, that says whose it is.
//! Ranges lie in 0x7000_0000 to 0x7fff_0000: above what systemd gives containers and distributions give users, below the
//! ids that programs with signed numbers break at. Whatever /etc/subuid, /etc/subgid or the user database name there is
//! left out. Files on disk carry unshifted owners, so that a guest may have another range after its next start.

use karst_guest::IdRange;
use karst_model::{Error, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use std::{
    fs,
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// Ids of a range.
pub const COUNT: u32 = 65_536;
const FIRST: u32 = 0x7000_0000;
const RANGES: u32 = 0xfff;
/// Where the claims of all daemons of a machine lie.
pub const CLAIMS: &str = "/run/karst/ids";

/// After this long nobody is at writing a claim any more.
const WRITTEN: Duration = Duration::from_secs(60);

/// Claims of one daemon.
#[derive(Debug, Clone)]
pub struct IdRanges {
    directory: PathBuf,
    daemon_id: String,
    /// Ids that belong to others: first and last.
    taken: Vec<(u32, u32)>,
}

/// A claim that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The range.
    pub range: IdRange,
    /// What for: a guest's id, or `worker`.
    pub owner: String,
}

impl IdRanges {
    /// Claims in `directory` ([`CLAIMS`] but for tests).
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(directory: impl Into<PathBuf>, daemon_id: &str) -> Result<Self> {
        let directory = directory.into();
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&directory)?;
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mut taken = vec![];
        for file in ["/etc/subuid", "/etc/subgid"] {
            taken.extend(subordinate(&read(file)));
        }
        for file in ["/etc/passwd", "/etc/group"] {
            let ids = read(file);
            let ids = ids.lines().filter_map(|l| l.split(':').nth(2)?.parse().ok());
            taken.extend(ids.map(|id: u32| (id, id)));
        }
        let ranges = Self { directory, daemon_id: daemon_id.to_owned(), taken };
        ranges.sweep();
        Ok(ranges)
    }

    fn free_of_others(&self, base: u32) -> bool {
        self.taken.iter().all(|(first, last)| *last < base || *first > base + (COUNT - 1))
    }

    fn file(&self, base: u32) -> PathBuf {
        self.directory.join(base.to_string())
    }

    /// Claims one range: `wanted` again if it is still free or ours, else another.
    ///
    /// # Errors
    /// Quota when all ranges of the machine are claimed.
    pub fn claim(&self, owner: &str, wanted: Option<IdRange>) -> Result<IdRange> {
        self.claim_many(owner, wanted.map(|r| r.base), COUNT, false)
    }

    /// Claims `count` ids in one piece, a multiple of [`COUNT`]: at `wanted` if they are free or ours there, else elsewhere
    /// unless it must be `there`.
    ///
    /// # Errors
    /// Quota when so many are not free in one piece; conflict when it must be there and they are another's; invalid when no
    /// range can begin there.
    pub fn claim_many(&self, owner: &str, wanted: Option<u32>, count: u32, there: bool) -> Result<IdRange> {
        let slots = (count / COUNT).max(1);
        // Spread, so that daemons seldom try for the same.
        let start = u32::from_str_radix(&self.daemon_id, 16).unwrap_or(0) % RANGES;
        let all = (0..RANGES).map(|n| FIRST + ((start + n) % RANGES) * COUNT);
        let fits = |base: u32| {
            base >= FIRST && base.is_multiple_of(COUNT) && (base - FIRST) / COUNT + slots <= RANGES
        };
        if there && !wanted.is_some_and(fits) {
            return Err(Error::invalid(
                "config.security.idmap.base",
                format!("a range of {count} ids can begin at a multiple of {COUNT} from {FIRST} on"),
            ));
        }
        let wanted = wanted.filter(|base| fits(*base));
        let others = all.filter(|_| !there).filter(|base| fits(*base));
        for base in wanted.into_iter().chain(others) {
            if self.claim_at(owner, base, slots)? {
                return Ok(IdRange { base, count: slots * COUNT });
            }
        }
        if there {
            let text = "ids of that range belong to others; leave security.idmap.base out";
            return Err(Error::conflict(text).at("config.security.idmap.base"));
        }
        Err(Error::quota("all ranges of user ids of this machine are in use; delete guests"))
    }

    /// Claims all of these or none.
    fn claim_at(&self, owner: &str, base: u32, slots: u32) -> Result<bool> {
        let mine = format!("{} {owner}\n", self.daemon_id);
        let mut new = vec![];
        for base in (0..slots).map(|n| base + n * COUNT) {
            let file = self.file(base);
            let ours = if !self.free_of_others(base) {
                Ok(false)
            } else {
                match self.create(&file, &mine) {
                    Ok(()) => {
                        new.push(file.clone());
                        Ok(true)
                    }
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        Ok(fs::read_to_string(&file).is_ok_and(|text| text == mine))
                    }
                    Err(e) => Err(e),
                }
            };
            if !matches!(ours, Ok(true)) {
                for file in new {
                    fs::remove_file(file)?;
                }
                return ours.map_err(|e| Error::from(e).with_context(file.display()));
            }
        }
        Ok(true)
    }

    /// Makes a claim's file, whole or not at all: who is killed in between leaves nothing that belongs to nobody. The directory
    /// too, which another daemon's purge may just have taken away.
    fn create(&self, file: &Path, text: &str) -> io::Result<()> {
        let create = || -> io::Result<()> {
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            let mut nameless =
                fs::File::from(openat(CWD, &self.directory, flags, Mode::from_raw_mode(0o644))?);
            nameless.write_all(text.as_bytes())?;
            let itself = format!("/proc/self/fd/{}", nameless.as_raw_fd());
            // A name that is taken is not replaced.
            Ok(linkat(CWD, itself, CWD, file, AtFlags::SYMLINK_FOLLOW)?)
        };
        match create() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.directory)?;
                create()
            }
            made => made,
        }
    }

    /// Takes away claims that say nothing. Daemons of earlier versions made the file first and wrote to it then; one that was
    /// killed in between left them.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let old =
                |m: &fs::Metadata| m.modified().is_ok_and(|t| t.elapsed().is_ok_and(|age| age > WRITTEN));
            if entry.metadata().is_ok_and(|m| m.is_file() && m.len() == 0 && old(&m)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Whether no daemon of the machine claims anything: the one that asks was the last of them.
    pub fn unclaimed(&self) -> bool {
        match fs::read_dir(&self.directory) {
            Ok(mut claims) => claims.next().is_none(),
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Removes the directory, and the one above it, where nobody has anything in them: nothing of Karst stays on a machine
    /// whose last daemon was purged.
    pub fn leave(&self) {
        self.sweep();
        if fs::remove_dir(&self.directory).is_ok()
            && let Some(above) = self.directory.parent()
        {
            let _ = fs::remove_dir(above);
        }
    }

    /// Gives a range back; what of it is not ours stays.
    pub fn release(&self, range: IdRange, owner: &str) {
        let mine = format!("{} {owner}\n", self.daemon_id);
        for base in (0..range.count / COUNT).map(|n| range.base + n * COUNT) {
            let file = self.file(base);
            if fs::read_to_string(&file).is_ok_and(|text| text == mine) {
                let _ = fs::remove_file(file);
            }
        }
    }

    /// Gives back what of `old` is not in `new`.
    pub fn release_rest(&self, old: IdRange, new: IdRange, owner: &str) {
        for base in (0..old.count / COUNT).map(|n| old.base + n * COUNT) {
            if base < new.base || base - new.base >= new.count {
                self.release(IdRange { base, count: COUNT }, owner);
            }
        }
    }

    /// All claims of this daemon.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn claims(&self) -> Result<Vec<Claim>> {
        claims_of(&self.directory, &self.daemon_id)
    }
}

fn claims_of(directory: &Path, daemon_id: &str) -> Result<Vec<Claim>> {
    let mut found = vec![];
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries.flatten() {
        let base = entry.file_name().to_str().and_then(|n| n.parse().ok());
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let (Some(base), Some((id, owner))) = (base, text.trim().split_once(' '))
            && id == daemon_id
        {
            found.push(Claim { range: IdRange { base, count: COUNT }, owner: owner.to_owned() });
        }
    }
    Ok(found)
}

/// `name:first:count` lines.
fn subordinate(text: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut fields = line.split(':').skip(1);
        let (first, count): (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?);
        (count > 0).then(|| (first, first.saturating_add(count - 1)))
    };
    text.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_claimed_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let open = |id| IdRanges::open(dir.path().join("ids"), id).unwrap();
        let (a, b) = (open("000001"), open("000001"));
        let first = a.claim("guest-1", None).unwrap();
        assert_eq!(b.claim("guest-1", Some(first)).unwrap(), first, "the same owner, the same range");
        let second = b.claim("guest-2", Some(first)).unwrap();
        assert_ne!(first, second);
        let other = open("000002");
        let third = other.claim("guest-1", Some(second)).unwrap();
        assert!(third != first && third != second);
        other.release(first, "guest-1");
        assert_eq!(a.claims().unwrap().len(), 2, "not another's to give back");
        a.release(first, "guest-1");
        a.release(first, "guest-1");
        assert_eq!(a.claims().unwrap(), [Claim { range: second, owner: "guest-2".into() }]);
        for range in [first, second, third] {
            assert!(range.base >= FIRST && range.base.checked_add(range.count).unwrap() < 0x8000_0000);
        }
    }

    #[test]
    fn the_last_to_leave_takes_the_directory_away_and_the_next_makes_it_anew() {
        let dir = tempfile::tempdir().unwrap();
        let claims = dir.path().join("karst/ids");
        let (a, b) = (IdRanges::open(&claims, "000001").unwrap(), IdRanges::open(&claims, "000002").unwrap());
        let range = b.claim("guest-1", None).unwrap();
        a.leave();
        assert_eq!(b.claims().unwrap().len(), 1, "another's claim keeps it");
        assert!(!a.unclaimed());
        b.release(range, "guest-1");
        assert!(a.unclaimed());
        std::fs::write(dir.path().join("karst/other"), "").unwrap();
        b.leave();
        assert!(b.unclaimed());
        assert!(!claims.exists() && dir.path().join("karst/other").exists());
        std::fs::remove_file(dir.path().join("karst/other")).unwrap();
        assert_eq!(a.claims().unwrap(), []);
        let range = a.claim("guest-2", None).unwrap();
        assert_eq!(a.claims().unwrap().len(), 1, "its directory was made anew");
        a.release(range, "guest-2");
        a.leave();
        assert!(!dir.path().join("karst").exists());
    }

    #[test]
    fn a_claim_says_whose_it_is_from_the_first_moment_on() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = IdRanges::open(dir.path(), "000001").unwrap();
        static SEEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                let mut seen = 0u64;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for entry in fs::read_dir(dir.path()).unwrap().flatten() {
                        // Given back meanwhile.
                        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
                        assert!(text.starts_with("000001 guest-"), "{text:?}");
                        seen += 1;
                        SEEN.store(seen, std::sync::atomic::Ordering::Relaxed);
                    }
                }
                seen
            });
            let end = std::time::Instant::now() + Duration::from_secs(60);
            for n in 0.. {
                let owner = format!("guest-{n}");
                ranges.release(ranges.claim(&owner, None).unwrap(), &owner);
                // As often as it takes to be looked at, on a busy machine.
                if n >= 2000
                    && (SEEN.load(std::sync::atomic::Ordering::Relaxed) > 0
                        || end < std::time::Instant::now())
                {
                    break;
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(looking.join().unwrap() > 0);
        });
    }

    #[test]
    fn what_says_nothing_keeps_nobody_from_leaving() {
        let dir = tempfile::tempdir().unwrap();
        let claims = dir.path().join("karst/ids");
        let ranges = IdRanges::open(&claims, "000001").unwrap();
        let torn = claims.join(FIRST.to_string());
        fs::write(&torn, "").unwrap();
        ranges.leave();
        assert!(torn.exists(), "somebody may be at writing it");
        let long_ago = std::time::SystemTime::now() - 2 * WRITTEN;
        fs::File::options().write(true).open(&torn).unwrap().set_modified(long_ago).unwrap();
        ranges.leave();
        assert!(!dir.path().join("karst").exists());
    }

    #[test]
    fn larger_ranges_are_in_one_piece_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = IdRanges::open(dir.path(), "000000").unwrap();
        let one = ranges.claim("one", None).unwrap();
        let large = ranges.claim_many("large", Some(one.base), 4 * COUNT, false).unwrap();
        assert_eq!((large.base, large.count), (one.base + COUNT, 4 * COUNT), "after what another has");
        assert_eq!(ranges.claims().unwrap().len(), 5);
        let kind = |e: Result<IdRange>| e.unwrap_err().kind;
        use karst_model::ErrorKind::{Conflict, Invalid};
        assert_eq!(kind(ranges.claim_many("x", Some(large.base - COUNT), 2 * COUNT, true)), Conflict);
        assert_eq!(kind(ranges.claim_many("x", Some(1_000_000), COUNT, true)), Invalid);
        assert_eq!(ranges.claims().unwrap().len(), 5, "nothing of a failed claim stays");
        let small = ranges.claim_many("large", Some(large.base), 2 * COUNT, false).unwrap();
        ranges.release_rest(large, small, "large");
        assert_eq!(ranges.claims().unwrap().len(), 3);
    }

    #[test]
    fn what_others_have_is_left_out() {
        assert_eq!(
            subordinate("root:1000000:1000000000\nx:5:0\nbad\ny:7:2\n"),
            [(1_000_000, 1_000_999_999), (7, 8)]
        );
        let dir = tempfile::tempdir().unwrap();
        let mut ranges = IdRanges::open(dir.path(), "000000").unwrap();
        ranges.taken = vec![(FIRST + 5, FIRST + 5), (FIRST + COUNT, FIRST + 3 * COUNT - 1)];
        assert_eq!(ranges.claim("g", None).unwrap().base, FIRST + 3 * COUNT);
    }
}
