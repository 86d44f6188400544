//! Memory of virtual machines in files of the host: below what its policy grants, reached without links, root's alone.
//!
//! A file is written under a name of its own beside the one that it is to have (`.karst-ID.part`), made by nobody else (`O_EXCL`),
//! and gets its name when all of it is on disk. So what was there stays until then, and what is interrupted leaves a part that is
//! known by the record of its machine (`memory/INSTANCE.json`, on disk before the part is made): it goes when the writing is
//! cancelled, when another is begun, and with the machine. Only saved memory is written over.

use crate::{
    RealAgent,
    agent::{as_state, blocking},
    registry::Registry,
};
use karst_agent::{MachineMemoryBegin, MachineMemoryEnd, MachineMemoryRef, MemoryFileChange, MemoryWish};
use karst_guest::{GuestDriver, MemoryFiles, MemoryJob, MemoryShape, Opened, ResolvedMemory};
use karst_model::{
    Error, ErrorKind, InstanceId, MemoryJobId, Result,
    memory::{BLOCK, Layout, MAGIC, MemoryEnd, MemoryPhase, MemoryState, SavedMemory, new_head},
    spec::GuestSpec,
};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, linkat, openat, renameat_with, unlinkat},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    sync::Arc,
};

/// Below this there is no room for more.
const ROOM: u64 = 1 << 20;

/// Where memory of a machine is being written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    id: MemoryJobId,
    path: String,
    /// It is to be gone on from, and may replace such a file.
    saved: bool,
    /// It has its name.
    kept: bool,
    /// Device and inode of what is to get the name, known before it does.
    #[serde(default)]
    made: Option<(u64, u64)>,
}

impl Place {
    fn part(&self) -> String {
        format!(".karst-{}.part", self.id)
    }
}

pub(crate) fn files(driver: &Arc<dyn GuestDriver>) -> Result<&dyn MemoryFiles> {
    driver
        .memory_files()
        .ok_or_else(|| Error::unsupported("only of virtual machines the memory is written to a file"))
}

fn damaged(what: &str) -> Error {
    Error::invalid("path", format!("the file is no memory of a virtual machine that can be used: {what}"))
}

fn io(e: Errno) -> Error {
    std::io::Error::from(e).into()
}

impl Registry {
    fn memory_file(&self, instance: InstanceId) -> PathBuf {
        self.path("memory").join(format!("{}.json", instance.0))
    }

    fn memory_place(&self, instance: InstanceId) -> Result<Option<Place>> {
        match std::fs::read(self.memory_file(instance)) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|e| Error::internal("where memory of a guest is written cannot be read", e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn put_memory_place(&self, instance: InstanceId, place: &Place) -> Result<()> {
        let path = self.memory_file(instance);
        let new = path.with_extension("new");
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(place)?)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        Ok(File::open(self.path("memory"))?.sync_all()?)
    }

    fn drop_memory_place(&self, instance: InstanceId) -> Result<()> {
        match std::fs::remove_file(self.memory_file(instance)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Machines whose memory was being written, or had been.
    pub(crate) fn memory_places(&self) -> Vec<(InstanceId, bool)> {
        let found = std::fs::read_dir(self.path("memory")).into_iter().flatten().flatten();
        let ids = found.filter_map(|e| e.file_name().to_str()?.strip_suffix(".json")?.parse().ok());
        ids.map(|id: InstanceId| (id, self.memory_place(id).is_ok_and(|p| p.is_some_and(|p| p.kept))))
            .collect()
    }
}

/// Opens what is there for reading, if it is a file.
fn open(directory: &OwnedFd, name: &str, write: bool) -> Result<Option<File>> {
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let found = match openat(directory, name, flags, Mode::empty()) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NXIO | Errno::ISDIR) => return Err(damaged("it is no file")),
        Err(e) => return Err(io(e)),
    };
    let stat = rustix::fs::fstat(&found).map_err(io)?;
    match FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        true => Ok(Some(found.into())),
        false => Err(damaged("it is no file")),
    }
}

/// What is there that memory would be written over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Nothing,
    Saved,
}

/// Refuses to write over what is none of ours.
fn demand_own(directory: &OwnedFd, name: &str, place: &Place) -> Result<There> {
    let other = || {
        let text = format!("{:?} is there already; remove it, or choose another name", place.path);
        Error::conflict(text).at("path")
    };
    let Some(file) = open(directory, name, false).map_err(|_| other())? else { return Ok(There::Nothing) };
    let mut magic = [0; MAGIC.len()];
    match place.saved && file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC {
        true => Ok(There::Saved),
        false => Err(other()),
    }
}

/// What is before the memory in a file, and where the memory begins.
fn read_head(file: &File) -> Result<(Layout, u64, SavedMemory)> {
    let mut block = vec![0; BLOCK];
    file.read_exact_at(&mut block, 0).map_err(|_| damaged("it is too short"))?;
    let layout = Layout::read(&block)?;
    let mut head = vec![0; layout.head()];
    file.read_exact_at(&mut head, 0).map_err(|_| damaged("it is too short"))?;
    let (number, saved) = layout.saved(&head)?;
    Ok((layout, number, saved))
}

/// The same of a file whose memory is whole.
fn read_whole(file: &File) -> Result<(Layout, u64, SavedMemory)> {
    let (layout, number, saved) = read_head(file)?;
    let length = file.metadata()?.len();
    let whole = saved.stream.and_then(|stream| stream.checked_add(layout.head() as u64));
    match whole.is_some_and(|whole| length >= whole) {
        true => Ok((layout, number, saved)),
        false => Err(damaged("it is not whole")),
    }
}

/// Has a file say something else of itself; what it says is on disk when this answers.
fn change(file: &File, layout: Layout, number: u64, saved: &SavedMemory) -> Result<()> {
    let number = number.checked_add(1).ok_or_else(|| damaged("it was changed too often"))?;
    file.write_all_at(&layout.slot(number, saved)?, layout.slot_at(number) as u64)?;
    Ok(file.sync_data()?)
}

/// Gives a part that is whole its name. May be done again.
fn keep(directory: &OwnedFd, name: &str, place: &Place) -> Result<()> {
    let part = place.part();
    let Some(file) = open(directory, &part, true)? else {
        // A call that was broken off has.
        return match open(directory, name, false)? {
            Some(_) => Ok(()),
            None => Err(Error::not_found("what was written of the guest's memory is gone")),
        };
    };
    if place.saved {
        let (layout, number, saved) = read_head(&file)?;
        let stream = file.metadata()?.len().saturating_sub(layout.head() as u64);
        if saved.stream.is_none() {
            file.sync_all()?;
            change(&file, layout, number, &SavedMemory { stream: Some(stream), ..saved })?;
        }
    }
    file.sync_all()?;
    // Both names are of it already: a kill came between the link and the removal of the first.
    let of = |file: &File| file.metadata().map(|m| (m.dev(), m.ino()));
    if let Some(named) = open(directory, name, false).ok().flatten()
        && of(&named)? == of(&file)?
    {
        remove(directory, &part)?;
        return rustix::fs::fsync(directory).map_err(io);
    }
    let flags = match demand_own(directory, name, place)? {
        There::Nothing => RenameFlags::NOREPLACE,
        There::Saved => RenameFlags::empty(),
    };
    let named = match renameat_with(directory, &part, directory, name, flags) {
        // File systems without that: a second name is made over nothing either.
        Err(Errno::INVAL | Errno::NOSYS) if flags == RenameFlags::NOREPLACE => {
            linkat(directory, &part, directory, name, AtFlags::empty())
        }
        other => other,
    };
    match named {
        Err(Errno::EXIST) => {
            let text = format!("{:?} was made by somebody else meanwhile", place.path);
            return Err(Error::conflict(text).at("path"));
        }
        other => other.map_err(io)?,
    }
    // The first of two names, or of one that a kill left behind.
    remove(directory, &part)?;
    rustix::fs::fsync(directory).map_err(io)
}

fn remove(directory: &OwnedFd, name: &str) -> Result<()> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        other => other.map_err(io),
    }
}

impl RealAgent {
    /// Removes the part of what was not kept, and forgets it.
    async fn drop_part(&self, instance: InstanceId, place: &Place) -> Result<()> {
        let (policy, registry, place) = (self.policy().clone(), self.registry.clone(), place.clone());
        blocking(move || {
            // A directory that is gone, or granted no more, has no part that could be reached.
            if !place.kept
                && let Ok((directory, _)) = policy.save_place(&place.path)
            {
                remove(&directory, &place.part())?;
            }
            registry.drop_memory_place(instance)
        })
        .await
    }

    /// As the policy says, of a file system that may be one that does not answer.
    async fn save_place(&self, path: &str) -> Result<(OwnedFd, String)> {
        let (policy, path) = (self.policy().clone(), path.to_owned());
        blocking(move || policy.save_place(&path)).await
    }

    /// What is left of a machine that goes.
    pub(crate) async fn forget_memory(&self, instance: InstanceId) -> Result<()> {
        match self.registry.memory_place(instance)? {
            Some(place) => self.drop_part(instance, &place).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn begin_memory(&self, request: MachineMemoryBegin) -> Result<()> {
        let MachineMemoryBegin { guest, id, path, wish } = request;
        let instance = guest.instance;
        let _lock = self.lock(instance.0).await;
        let (directory, name) = self.save_place(&path).await?;
        let (_, driver) = self.meant(guest)?;
        let driver = files(driver)?;
        if !self.runs(instance).await? {
            return Err(Error::conflict(format!("instance {instance} is not running")));
        }
        let saved = matches!(wish, MemoryWish::Save { .. });
        if let Some(old) = self.registry.memory_place(instance)? {
            let goes_on = driver.state(instance, Some(old.id)).await?.phase != MemoryPhase::Gone;
            match goes_on {
                true if old.id == id => return Ok(()),
                true if !old.kept => {
                    return Err(Error::conflict("the memory of the guest is being written already"));
                }
                _ => self.drop_part(instance, &old).await?,
            }
        }
        let place = Place { id, path, saved, kept: false, made: None };
        let head = match &wish {
            MemoryWish::Dump { .. } => vec![],
            MemoryWish::Save { document, paused } => {
                let of = driver.shape(instance).await.map_err(as_state(instance))?;
                let MemoryShape { uuid, machine, words: shape } = of;
                let (document, paused) = (document.clone(), *paused);
                new_head(&SavedMemory { uuid, machine, document, shape, paused, stream: None })?
            }
        };
        let job = match wish {
            MemoryWish::Save { .. } => MemoryJob::Save,
            MemoryWish::Dump { format } => MemoryJob::Dump(format),
        };
        let (registry, part, noted) = (self.registry.clone(), place.part(), place.clone());
        let file = blocking(move || {
            demand_own(&directory, &name, &noted)?;
            registry.put_memory_place(instance, &noted)?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = openat(&directory, &part, flags, Mode::from_raw_mode(0o600)).map_err(io)?;
            let mut file = File::from(made);
            file.write_all(&head)?;
            Ok(file)
        });
        let begun = match file.await {
            Ok(file) => driver.begin(instance, id, job, file.into()).await.map_err(as_state(instance)),
            Err(e) => Err(e),
        };
        if begun.is_err() {
            self.drop_part(instance, &place).await?;
        }
        begun
    }

    pub(crate) async fn memory_state(&self, at: MachineMemoryRef) -> Result<MemoryState> {
        let Ok((_, driver)) = self.known(at.instance) else { return Ok(MemoryState::default()) };
        let Some(driver) = driver.memory_files() else { return Ok(MemoryState::default()) };
        let place = self.registry.memory_place(at.instance)?.filter(|p| Some(p.id) == at.id);
        let state = driver.state(at.instance, at.id).await?;
        let MemoryPhase::Failed { .. } = state.phase else { return Ok(state) };
        match place {
            // QEMU does not always say why.
            Some(place) if self.is_full(&place).await => {
                let reason = format!("there is not enough room for the memory where {:?} is", place.path);
                Ok(MemoryState { phase: MemoryPhase::Failed { reason }, ..state })
            }
            _ => Ok(state),
        }
    }

    async fn is_full(&self, place: &Place) -> bool {
        let (policy, path) = (self.policy().clone(), place.path.clone());
        let looked = blocking(move || {
            let (directory, _) = policy.save_place(&path)?;
            let s = rustix::fs::fstatvfs(&directory).map_err(io)?;
            Ok(s.f_bavail.saturating_mul(s.f_frsize) < ROOM)
        });
        looked.await.unwrap_or(false)
    }

    pub(crate) async fn end_memory(&self, request: MachineMemoryEnd) -> Result<()> {
        let MachineMemoryEnd { memory: MachineMemoryRef { instance, id }, end } = request;
        let _lock = self.lock(instance.0).await;
        let place = self.registry.memory_place(instance)?.filter(|p| Some(p.id) == id);
        let driver = match self.known(instance) {
            Ok((_, driver)) => driver.memory_files(),
            Err(_) => None,
        };
        match end {
            MemoryEnd::Keep => {
                let gone =
                    || Error::conflict("the memory of the guest is not being written, or not any more");
                let (mut place, driver) = place.zip(driver).ok_or_else(gone)?;
                if place.kept {
                    // Of a call that was broken off after the file had its name: QEMU's side may still be noted.
                    return match driver.state(instance, id).await?.phase {
                        MemoryPhase::Done => {
                            driver.end(instance, id, MemoryEnd::Keep).await.map_err(as_state(instance))
                        }
                        _ => Ok(()),
                    };
                }
                if driver.state(instance, id).await?.phase != MemoryPhase::Done {
                    return Err(gone());
                }
                let (directory, name) = self.save_place(&place.path).await?;
                let registry = self.registry.clone();
                blocking(move || {
                    if let Some(part) = open(&directory, &place.part(), false)? {
                        let of = part.metadata()?;
                        place.made = Some((of.dev(), of.ino()));
                        registry.put_memory_place(instance, &place)?;
                    }
                    keep(&directory, &name, &place)?;
                    place.kept = true;
                    registry.put_memory_place(instance, &place)
                })
                .await?;
                driver.end(instance, id, MemoryEnd::Keep).await.map_err(as_state(instance))
            }
            MemoryEnd::Cancel => {
                // It comes back to life: what it was is not to be gone on from. One that has ended, or ends, or was started anew
                // is only in the file; and what has taken its place since is somebody else's.
                let comes_back = match driver {
                    Some(driver) => driver.state(instance, id).await?.phase == MemoryPhase::Done,
                    None => false,
                };
                if let Some((place, made)) =
                    place.as_ref().filter(|_| comes_back).and_then(|p| Some((p, p.made?)))
                {
                    let (directory, name) = self.save_place(&place.path).await?;
                    blocking(move || {
                        let found = open(&directory, &name, false).ok().flatten();
                        match found.map(|f| f.metadata()).transpose()?.map(|m| (m.dev(), m.ino())) {
                            Some(found) if found == made => remove(&directory, &name),
                            _ => Ok(()),
                        }
                    })
                    .await?;
                }
                if let Some(driver) = driver {
                    match driver.end(instance, id, MemoryEnd::Cancel).await {
                        Err(e) if e.is(ErrorKind::NotFound) => {}
                        other => other?,
                    }
                }
                match place {
                    Some(place) => self.drop_part(instance, &place).await,
                    None => Ok(()),
                }
            }
        }
    }

    async fn opened_memory(&self, path: &str, write: bool) -> Result<File> {
        let (policy, path) = (self.policy().clone(), path.to_owned());
        blocking(move || {
            let (directory, name) = policy.save_place(&path)?;
            open(&directory, &name, write)?
                .ok_or_else(|| Error::not_found(format!("{path:?} does not exist on the host")).at("path"))
        })
        .await
    }

    pub(crate) async fn read_memory_file(&self, path: String) -> Result<SavedMemory> {
        let file = self.opened_memory(&path, false).await?;
        blocking(move || Ok(read_whole(&file)?.2)).await
    }

    pub(crate) async fn change_memory_file(&self, request: MemoryFileChange) -> Result<()> {
        let file = self.opened_memory(&request.path, true).await?;
        blocking(move || {
            let (layout, number, saved) = read_whole(&file)?;
            if saved.uuid != request.uuid {
                return Err(Error::conflict("the file has the memory of another virtual machine").at("path"));
            }
            let new = SavedMemory { document: request.document, paused: request.paused, ..saved.clone() };
            if new == saved { Ok(()) } else { change(&file, layout, number, &new) }
        })
        .await
    }

    /// The memory that a start goes on from, if it does so from a file.
    pub(crate) async fn resolve_memory(&self, spec: &GuestSpec) -> Result<Option<ResolvedMemory>> {
        let Some(path) = &spec.memory else { return Ok(None) };
        let machine = spec.machine.as_ref();
        let uuid = machine.map(|m| m.uuid).ok_or_else(|| {
            Error::unsupported("virtual machines only go on from their memory").at("memory")
        })?;
        let mut file = self.opened_memory(path, false).await?;
        blocking(move || {
            let (layout, _, saved) = read_whole(&file)?;
            if saved.uuid != uuid {
                return Err(Error::conflict("the file has the memory of another virtual machine").at("path"));
            }
            file.seek(SeekFrom::Start(layout.head() as u64))?;
            Ok(Some(ResolvedMemory { file: Opened(Arc::new(file.into())), shape: saved.shape }))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(document: &str) -> SavedMemory {
        SavedMemory {
            uuid: uuid::Uuid::from_u128(7),
            machine: "pc-q35-7.2".into(),
            document: document.into(),
            shape: "{}".into(),
            paused: false,
            stream: None,
        }
    }

    fn place(saved: bool) -> Place {
        let id = MemoryJobId(uuid::Uuid::from_u128(3));
        Place { id, path: "/srv/saves/a".into(), saved, kept: false, made: None }
    }

    fn directory(dir: &tempfile::TempDir) -> OwnedFd {
        File::open(dir.path()).unwrap().into()
    }

    #[test]
    fn a_part_gets_its_name_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (at, place, path) = (directory(&dir), place(true), dir.path().join("a"));
        let mut content = new_head(&saved("first")).unwrap();
        let head = content.len() as u64;
        content.extend(b"memory");
        std::fs::write(dir.path().join(place.part()), &content).unwrap();
        assert!(read_whole(&File::open(dir.path().join(place.part())).unwrap()).is_err(), "not yet");
        keep(&at, "a", &place).unwrap();
        keep(&at, "a", &place).expect("it may be done again");
        let (_, _, found) = read_whole(&File::open(&path).unwrap()).unwrap();
        assert_eq!(found, SavedMemory { stream: Some(6), ..saved("first") });
        // Another takes its place.
        let mut content = new_head(&saved("second")).unwrap();
        content.extend(b"more memory");
        std::fs::write(dir.path().join(place.part()), &content).unwrap();
        keep(&at, "a", &place).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let (layout, number, found) = read_whole(&file).unwrap();
        assert_eq!((found.document.as_str(), found.stream), ("second", Some(11)));
        for n in 0..3 {
            let (_, number, _) = read_whole(&file).unwrap();
            change(&file, layout, number, &SavedMemory { document: format!("{n}"), ..found.clone() })
                .unwrap();
        }
        assert_eq!(read_whole(&file).unwrap().2.document, "2");
        assert_eq!(read_whole(&file).unwrap().1, number + 3);
        let long = SavedMemory { document: "x".repeat(120 << 10), ..found };
        assert!(change(&file, layout, number, &long).unwrap_err().is(ErrorKind::TooLarge));
        // What was cut off is not used.
        file.set_len(head + 10).unwrap();
        assert!(read_whole(&file).unwrap_err().message.contains("not whole"));
    }

    #[test]
    fn what_is_none_of_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = directory(&dir);
        let conflict = |name: &str, saved: bool| {
            demand_own(&at, name, &place(saved)).is_err_and(|e| e.is(ErrorKind::Conflict))
        };
        assert_eq!(demand_own(&at, "a", &place(true)).unwrap(), There::Nothing);
        std::fs::write(dir.path().join("a"), "something else").unwrap();
        std::os::unix::fs::symlink("/etc/shadow", dir.path().join("link")).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        for name in ["a", "link", "d"] {
            assert!(conflict(name, true) && conflict(name, false), "{name}");
            assert!(name == "a" || open(&at, name, false).is_err(), "{name}");
        }
        std::fs::write(dir.path().join("b"), new_head(&saved("x")).unwrap()).unwrap();
        assert_eq!(demand_own(&at, "b", &place(true)).unwrap(), There::Saved);
        assert!(conflict("b", false), "a dump writes over nothing");
        // What somebody made meanwhile is not written over either.
        std::fs::write(dir.path().join(place(false).part()), "dump").unwrap();
        assert!(keep(&at, "a", &place(false)).unwrap_err().is(ErrorKind::Conflict));
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"something else");
    }

    #[test]
    fn where_it_is_written_is_known_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().to_owned()).unwrap();
        let instance = InstanceId(uuid::Uuid::from_u128(9));
        assert_eq!(registry.memory_place(instance).unwrap(), None);
        registry.put_memory_place(instance, &place(true)).unwrap();
        assert_eq!(registry.memory_place(instance).unwrap(), Some(place(true)));
        assert_eq!(registry.memory_places(), [(instance, false)]);
        for _ in 0..2 {
            registry.drop_memory_place(instance).unwrap();
        }
        assert_eq!(registry.memory_places(), []);
    }
}
