//! Overlay file systems: a directory that changes over one that does not.
//!
//! What is mounted is nowhere yet: it goes with its descriptor, unless it is attached. The file system itself takes no
//! mapping of owners, its layers do (Linux 5.19), and it acts on them as whoever mounted it: so that one with mapped layers
//! is mounted by a thread whose file system ids are the first of the map.
//!
//! Options: `index=off`, because layers are copied; `redirect_dir=on`, so that directories of the lower layer can be
//! renamed. Source: the kernel's Documentation/filesystems/overlayfs.rst.

use crate::mountns::{self, MountOptions, in_thread};
use karst_model::{Error, Result};
use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

/// Two layers, in one file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// What the other two are relative to: option strings have no escapes that every kernel knows.
    pub directory: PathBuf,
    /// The directory that does not change; no `:`, `,` or `\`.
    pub lower: String,
    /// A directory that holds `upper` (what differs) and `work` (the kernel's); no `:`, `,` or `\`.
    pub over: String,
}

/// Owners of files: id 0 on disk is `base` of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// First id.
    pub base: u32,
    /// How many.
    pub count: u32,
}

fn failed(what: &'static str) -> impl Fn(rustix::io::Errno) -> Error {
    move |e| Error::internal("an overlay could not be mounted", format!("{what}: {}", io::Error::from(e)))
}

/// Mounts the layers. To write, nothing else may have them mounted for writing. With `ids` the owners on disk are mapped.
/// Device nodes are none. Blocking.
///
/// # Errors
/// Unsupported when the file system or the kernel cannot map the layers; internal else.
pub fn mount(layers: &Layers, write: bool, ids: Option<Mapped>) -> Result<OwnedFd> {
    let map = ids.map(|m| mountns::user_namespace(m.base, m.count)).transpose()?;
    in_thread(|| {
        if let (Some(map), Some(ids)) = (&map, ids) {
            mountns::leave()?;
            for layer in [&layers.lower, &layers.over] {
                let place = layers.directory.join(layer);
                let source = mountns::open_path(&place)?;
                let mapped = mountns::detached(source.as_fd(), MountOptions::default(), Some(map.as_fd()))?;
                mountns::attach(&mapped, &place)?;
            }
            act_as(ids.base)?;
        } else {
            // SAFETY: a plain call; only this thread is changed, which ends below.
            if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
                return Err(Error::internal("an overlay could not be mounted", io::Error::last_os_error()));
            }
        }
        std::env::set_current_dir(&layers.directory)?;
        let context = fsopen(c"overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
        let set =
            |key: &CStr, value: &str| fsconfig_set_string(&context, key, value).map_err(failed("fsconfig"));
        set(c"source", "karst")?;
        let (lower, upper) = (&layers.lower, format!("{}/upper", layers.over));
        if write {
            set(c"lowerdir", lower)?;
            set(c"upperdir", &upper)?;
            set(c"workdir", &format!("{}/work", layers.over))?;
            set(c"redirect_dir", "on")?;
        } else {
            set(c"lowerdir", &format!("{upper}:{lower}"))?;
            set(c"redirect_dir", "follow")?;
        }
        set(c"index", "off")?;
        set(c"metacopy", "off")?;
        fsconfig_create(&context).map_err(failed("the kernel refuses the layers"))?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        if !write {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
        }
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))
    })
}

/// Takes the file system ids `id` for this thread, which keeps its capabilities.
fn act_as(id: u32) -> Result<()> {
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: plain calls that change this thread alone; it ends with the work that it was started for.
    let taken = unsafe {
        libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0) == 0 && {
            libc::setfsgid(id);
            libc::setfsuid(id);
            // They answer what was before, also when they refuse.
            libc::setfsuid(id) as u32 == id && libc::setfsgid(id) as u32 == id
        }
    };
    if taken {
        Ok(())
    } else {
        Err(Error::internal("an overlay could not be mounted", io::Error::last_os_error()))
    }
}

/// Can the file system of `directory`, which is empty and the caller's to remove, hold such layers on this kernel? Tried:
/// a file of the lower layer is changed and a new one made through a mapped mount, and both have to be the map's first id's on disk.
/// Blocking.
pub fn works(directory: &std::path::Path) -> bool {
    let tried = (|| -> Result<bool> {
        for below in ["lower", "over", "over/upper", "over/work"] {
            std::fs::create_dir(directory.join(below))?;
        }
        std::fs::write(directory.join("lower/old"), "old")?;
        let layers = Layers { directory: directory.to_owned(), lower: "lower".into(), over: "over".into() };
        let ids = Mapped { base: 1_900_200_000, count: 1000 };
        let mounted = mount(&layers, true, Some(ids))?;
        in_thread(|| {
            act_as(ids.base)?;
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::APPEND | rustix::fs::OFlags::CREATE;
            for name in ["old", "new"] {
                let file =
                    rustix::fs::openat(&mounted, name, flags, 0o600.into()).map_err(io::Error::from)?;
                rustix::io::write(file, b"x").map_err(io::Error::from)?;
            }
            Ok(())
        })?;
        drop(mounted);
        let upper = rustix::fs::openat(
            CWD,
            directory.join("over/upper"),
            rustix::fs::OFlags::PATH,
            rustix::fs::Mode::empty(),
        )
        .map_err(io::Error::from)?;
        let owner = |name: &str| {
            let stat = rustix::fs::statat(&upper, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
            stat.is_ok_and(|s| s.st_uid == 0 && s.st_gid == 0)
        };
        Ok(owner("old") && owner("new"))
    })();
    match tried {
        Ok(works) => works,
        Err(e) => {
            tracing::debug!(error = %e, context = e.context.as_deref(), "no overlays with mapped layers here");
            false
        }
    }
}

/// A mount that is closed in the background when this is dropped: the last close of one that was written through writes all of the file
/// system below it to disk.
#[derive(Debug)]
pub struct Held(Option<OwnedFd>);

impl Held {
    /// Holds it.
    pub fn new(mount: OwnedFd) -> Self {
        Self(Some(mount))
    }

    /// A path to the mount's root for this process; links at its end are not followed through it.
    pub fn path(&self) -> PathBuf {
        path_of(self.0.as_ref())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        use std::sync::{LazyLock, mpsc};
        // One after the other, whoever ends at the same time: the first close has written out most of what the others would.
        static CLOSER: LazyLock<Option<mpsc::Sender<OwnedFd>>> = LazyLock::new(|| {
            let (close, closed) = mpsc::channel();
            let work = move || closed.into_iter().for_each(drop::<OwnedFd>);
            std::thread::Builder::new().name("unmount".into()).spawn(work).ok().map(|_| close)
        });
        if let (Some(mount), Some(closer)) = (self.0.take(), CLOSER.as_ref()) {
            // It goes with the message where nobody takes it.
            let _ = closer.send(mount);
        }
    }
}

fn path_of(mount: Option<&OwnedFd>) -> PathBuf {
    // The dot is a directory and no link, for those who open without following one.
    format!("/proc/self/fd/{}/.", mount.map_or(-1, AsRawFd::as_raw_fd)).into()
}
