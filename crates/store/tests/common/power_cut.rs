//! A file system for SQLite that can lose power.
//!
//! It is registered as the VFS `power-cut` and passes everything on to SQLite's own, so that the store works as always.
//! Beside that it keeps, for each file, what a disk would still hold after a power cut: the contents at the last sync
//! (`synced`), and every write and truncation since (`unsynced`), which the disk may or may not have done. At each write,
//! truncation and sync under a recorded directory it can take a snapshot of that. [`Snapshot::survive`] then makes the
//! files as they could be found after the power came back.
//!
//! # About the `unsafe`
//! SQLite calls a VFS through tables of C functions. A file of ours is a [`ShimFile`] followed, in the same block of memory
//! that SQLite allocates (`szOsFile` bytes), by the file object of the VFS beneath. The rules we rely on: SQLite passes
//! to a method only a `sqlite3_file` that our `x_open` filled in; it zeroes nothing behind our back between `xOpen` and
//! `xClose`; it does not use a file from two threads at once; and a path given to `xOpen` is NUL-terminated or null.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Once};

use rusqlite::ffi;

/// Name of the VFS.
pub const VFS: &str = "power-cut";
const C_VFS: &CStr = c"power-cut";
/// What a disk writes at once or not at all.
const SECTOR: usize = 512;

#[derive(Clone)]
enum Unsynced {
    Write { offset: usize, data: Vec<u8> },
    Truncate(usize),
}

#[derive(Clone, Default)]
struct Disk {
    synced: Vec<u8>,
    unsynced: Vec<Unsynced>,
}

/// What the disk holds at one moment, and what had been acknowledged before it.
#[derive(Clone)]
pub struct Snapshot {
    files: BTreeMap<PathBuf, Disk>,
    pub acknowledged: Vec<u64>,
}

/// How much of what was not synced the disk has written when the power goes.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// Nothing.
    All,
    /// Each sector or not, by this seed.
    Some(u64),
}

struct Recording {
    directory: PathBuf,
    acknowledged: Arc<Mutex<Vec<u64>>>,
    snapshots: Vec<Snapshot>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<PathBuf, Disk>,
    recording: Option<Recording>,
    /// What fails under which directory.
    broken: Option<(PathBuf, Fault)>,
}

static STATE: Mutex<State> = Mutex::new(State { files: BTreeMap::new(), recording: None, broken: None });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl State {
    fn fails(&self, path: &Path, fault: Fault) -> bool {
        self.broken
            .as_ref()
            .is_some_and(|(directory, broken)| *broken == fault && path.starts_with(directory))
    }

    /// To be called before a change reaches the disk.
    fn snapshot(&mut self, path: &Path) {
        let Some(recording) = &mut self.recording else {
            return;
        };
        if !path.starts_with(&recording.directory) {
            return;
        }
        let files = self.files.iter().filter(|(path, _)| path.starts_with(&recording.directory));
        let files = files.map(|(path, disk)| (path.clone(), disk.clone())).collect();
        let acknowledged = recording.acknowledged.lock().unwrap().clone();
        recording.snapshots.push(Snapshot { files, acknowledged });
    }
}

/// How a disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing can be written, as over a quota.
    Write,
    /// What was written cannot be synced.
    Sync,
}

/// Lets every write or sync under `directory` fail from now on.
pub fn break_disk(directory: &Path, fault: Fault) {
    state().broken = Some((directory.to_owned(), fault));
}

/// Nothing fails any more.
pub fn mend_disk() {
    state().broken = None;
}

/// Starts to take a snapshot at each change under `directory`, with what `acknowledged` holds then.
pub fn record(directory: &Path, acknowledged: Arc<Mutex<Vec<u64>>>) {
    let recording = Recording { directory: directory.to_owned(), acknowledged, snapshots: Vec::new() };
    state().recording = Some(recording);
}

/// Stops; gives the snapshots.
pub fn stop_recording() -> Vec<Snapshot> {
    state().recording.take().map(|recording| recording.snapshots).unwrap_or_default()
}

impl Disk {
    fn apply(contents: &mut Vec<u8>, change: &Unsynced, mut keeps: impl FnMut() -> bool) {
        match change {
            Unsynced::Truncate(length) => {
                if keeps() {
                    contents.resize(*length, 0);
                }
            }
            Unsynced::Write { offset, data } => {
                for (number, sector) in data.chunks(SECTOR).enumerate() {
                    if !keeps() {
                        continue;
                    }
                    let start = offset + number * SECTOR;
                    let end = start + sector.len();
                    if contents.len() < end {
                        contents.resize(end, 0);
                    }
                    contents[start..end].copy_from_slice(sector);
                }
            }
        }
    }

    fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            Disk::apply(&mut self.synced, &change, || true);
        }
    }

    fn survive(&self, loss: Loss, salt: u64) -> Vec<u8> {
        let mut contents = self.synced.clone();
        if let Loss::Some(seed) = loss {
            // A small generator (splitmix64): the module has no other use for randomness.
            let mut number = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
            let mut keeps = || {
                number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (mixed ^ (mixed >> 31)) & 1 == 1
            };
            for change in &self.unsynced {
                Disk::apply(&mut contents, change, &mut keeps);
            }
        }
        contents
    }
}

impl Snapshot {
    /// Is there anything that a power cut could lose?
    pub fn has_unsynced(&self) -> bool {
        self.files.values().any(|disk| !disk.unsynced.is_empty())
    }

    /// Writes the database and its log into `directory`, as they are after a power cut at this moment.
    pub fn survive(&self, loss: Loss, directory: &Path) {
        for (number, (path, disk)) in self.files.iter().enumerate() {
            let name = path.file_name().unwrap();
            std::fs::write(directory.join(name), disk.survive(loss, number as u64)).unwrap();
        }
    }
}

/// Our part of a file object; the part of the VFS beneath follows it.
#[repr(C)]
struct ShimFile {
    base: ffi::sqlite3_file,
    /// `None` for temporary files, which nobody misses.
    path: Option<Box<PathBuf>>,
}

/// The file of the VFS beneath.
///
/// # Safety
/// `file` must be one that `x_open` was called for.
unsafe fn below(file: *mut ffi::sqlite3_file) -> *mut ffi::sqlite3_file {
    // SAFETY: szOsFile reserves a ShimFile and what the VFS beneath asked for, in one block aligned for pointers.
    unsafe { file.cast::<ShimFile>().add(1).cast() }
}

/// # Safety
/// As [`below`], and the file must be open.
unsafe fn path_of<'a>(file: *mut ffi::sqlite3_file) -> Option<&'a Path> {
    // SAFETY: x_open wrote a ShimFile there, and x_close has not been called.
    unsafe { (*file.cast::<ShimFile>()).path.as_deref().map(PathBuf::as_path) }
}

/// Passes a method on to the file beneath.
macro_rules! forward {
    ($($name:ident => $method:ident ( $($argument:ident : $kind:ty),* ) -> $result:ty;)+) => {$(
        unsafe extern "C" fn $name(file: *mut ffi::sqlite3_file, $($argument: $kind),*) -> $result {
            // SAFETY: SQLite calls this for a file that x_open opened, so the one beneath is open as well.
            unsafe {
                let real = below(file);
                ((*(*real).pMethods).$method.unwrap())(real, $($argument),*)
            }
        }
    )+};
}

forward! {
    x_read => xRead(buffer: *mut c_void, amount: c_int, offset: ffi::sqlite3_int64) -> c_int;
    x_file_size => xFileSize(size: *mut ffi::sqlite3_int64) -> c_int;
    x_lock => xLock(level: c_int) -> c_int;
    x_unlock => xUnlock(level: c_int) -> c_int;
    x_check_reserved_lock => xCheckReservedLock(result: *mut c_int) -> c_int;
    x_file_control => xFileControl(op: c_int, argument: *mut c_void) -> c_int;
    x_sector_size => xSectorSize() -> c_int;
    x_shm_map => xShmMap(page: c_int, size: c_int, extend: c_int, memory: *mut *mut c_void) -> c_int;
    x_shm_lock => xShmLock(offset: c_int, count: c_int, flags: c_int) -> c_int;
    x_shm_barrier => xShmBarrier() -> ();
    x_shm_unmap => xShmUnmap(delete: c_int) -> c_int;
}

/// Promises nothing about what a power cut leaves, so that SQLite relies on nothing but syncs.
unsafe extern "C" fn x_device_characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    0
}

unsafe extern "C" fn x_write(
    file: *mut ffi::sqlite3_file,
    buffer: *const c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: the file is open, and SQLite gives `amount` readable bytes at `buffer`.
    unsafe {
        if let Some(path) = path_of(file) {
            if state().fails(path, Fault::Write) {
                return ffi::SQLITE_IOERR_WRITE;
            }
            let data = std::slice::from_raw_parts(buffer.cast::<u8>(), amount as usize).to_vec();
            let mut state = state();
            state.snapshot(path);
            if let Some(disk) = state.files.get_mut(path) {
                disk.unsynced.push(Unsynced::Write { offset: offset as usize, data });
            }
        }
        let real = below(file);
        ((*(*real).pMethods).xWrite.unwrap())(real, buffer, amount, offset)
    }
}

unsafe extern "C" fn x_truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    // SAFETY: the file is open.
    unsafe {
        if let Some(path) = path_of(file) {
            let mut state = state();
            state.snapshot(path);
            if let Some(disk) = state.files.get_mut(path) {
                disk.unsynced.push(Unsynced::Truncate(size as usize));
            }
        }
        let real = below(file);
        ((*(*real).pMethods).xTruncate.unwrap())(real, size)
    }
}

unsafe extern "C" fn x_sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: the file is open.
    if let Some(path) = unsafe { path_of(file) } {
        let mut state = state();
        if state.fails(path, Fault::Sync) {
            return ffi::SQLITE_IOERR_FSYNC;
        }
        state.snapshot(path);
        if let Some(disk) = state.files.get_mut(path) {
            disk.sync();
        }
    }
    // The real disk need not sync: nobody cuts its power.
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: the file is open; SQLite does not use it after this, so the path can go.
    unsafe {
        let real = below(file);
        let result = ((*(*real).pMethods).xClose.unwrap())(real);
        (*file.cast::<ShimFile>()).path = None;
        result
    }
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2, // shared memory for the WAL, no memory mapping of the file
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

/// The VFS beneath, which `register` put there.
///
/// # Safety
/// `vfs` must be ours.
unsafe fn real_vfs(vfs: *mut ffi::sqlite3_vfs) -> *mut ffi::sqlite3_vfs {
    // SAFETY: register() set pAppData to the default VFS, which lives as long as the process.
    unsafe { (*vfs).pAppData.cast() }
}

/// # Safety
/// `name` must be null or NUL-terminated.
unsafe fn path_from(name: *const c_char) -> Option<PathBuf> {
    // SAFETY: as the caller promises.
    (!name.is_null()).then(|| PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes())))
}

unsafe extern "C" fn x_open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives szOsFile bytes at `file` and a name that is null or NUL-terminated.
    unsafe {
        let real = real_vfs(vfs);
        let path = path_from(name).filter(|_| {
            flags & (ffi::SQLITE_OPEN_MAIN_DB | ffi::SQLITE_OPEN_WAL | ffi::SQLITE_OPEN_MAIN_JOURNAL) != 0
        });
        if let Some(path) = &path {
            // What was there before is taken to be on the disk.
            let found = std::fs::read(path).unwrap_or_default();
            state().files.entry(path.clone()).or_insert(Disk { synced: found, unsynced: Vec::new() });
        }
        let shim = file.cast::<ShimFile>();
        shim.write(ShimFile {
            base: ffi::sqlite3_file { pMethods: std::ptr::null() },
            path: path.map(Box::new),
        });
        let beneath = below(file);
        (*beneath).pMethods = std::ptr::null();
        let result = ((*real).xOpen.unwrap())(real, name, beneath, flags, out_flags);
        if (*beneath).pMethods.is_null() {
            (*shim).path = None; // SQLite will not call xClose
        } else {
            (*shim).base.pMethods = &METHODS;
        }
        result
    }
}

unsafe extern "C" fn x_delete(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, sync_dir: c_int) -> c_int {
    // SAFETY: SQLite gives a NUL-terminated name.
    unsafe {
        if let Some(path) = path_from(name) {
            state().files.remove(&path);
        }
        let real = real_vfs(vfs);
        ((*real).xDelete.unwrap())(real, name, sync_dir)
    }
}

/// Makes the VFS known to SQLite, once.
pub fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the default VFS is registered by initialization and lives for ever; ours is leaked, so it does too.
        // The methods that we keep from the copy never look at pAppData in SQLite's unix VFS, except through the
        // pointer to the VFS itself, which is why x_open and x_delete pass the original.
        unsafe {
            assert_eq!(ffi::sqlite3_initialize(), ffi::SQLITE_OK);
            let real = ffi::sqlite3_vfs_find(std::ptr::null());
            assert!(!real.is_null());
            let ours = Box::new(ffi::sqlite3_vfs {
                szOsFile: (*real).szOsFile + std::mem::size_of::<ShimFile>() as c_int,
                pNext: std::ptr::null_mut(),
                zName: C_VFS.as_ptr(),
                pAppData: real.cast(),
                xOpen: Some(x_open),
                xDelete: Some(x_delete),
                ..std::ptr::read(real)
            });
            assert_eq!(ffi::sqlite3_vfs_register(Box::into_raw(ours), 0), ffi::SQLITE_OK);
        }
    });
}
