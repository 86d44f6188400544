//! Images of the OCI: a layout (`oci-layout`, `index.json`, `blobs/sha256/…`) in a tar archive that is not compressed, as
//! `skopeo copy … oci-archive:`, newer `docker save` and `tar -C LAYOUT -c .` make it. The part that runs inside the worker.
//!
//! The image's fingerprint is the digest of its manifest. Each blob is compared with its digest before anything is made of
//! it. Layers are applied over each other with their whiteouts; a link that an earlier layer made is followed within the tree
//! and never out of it. Formats: the OCI's image-spec 1.1 and Docker's manifest 2.2.

use crate::{
    metadata::Metadata,
    unpack::{Bounds, Found, Layers},
};
use karst_model::{
    Config, Error, Result,
    image::{Application, machine_name},
    oci::{DOCUMENT, Descriptor, choose, digest, is_index, manifest, parse},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

/// Files of an archive.
const MOST_BLOBS: usize = 4096;

#[derive(Deserialize)]
struct Image {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    config: Option<Runtime>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Runtime {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    stop_signal: Option<String>,
}

/// Where the files of an archive lie in it.
struct Archive<'a> {
    file: &'a File,
    field: &'a str,
    /// Names, places and sizes.
    files: BTreeMap<String, (u64, u64)>,
}

/// Bytes of a file from a place on.
struct Piece<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Piece<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Names that stand in a layout beside what may be anywhere.
fn belongs(name: &str) -> bool {
    matches!(
        name,
        "" | "oci-layout" | "index.json" | "manifest.json" | "repositories" | "blobs" | "blobs/sha256"
    ) || name.strip_prefix("blobs/sha256/").is_some_and(|b| b.len() == 64)
}

/// The files of an archive that is a layout; `None` when it is something else.
fn open<'a>(file: &'a File, field: &'a str) -> Option<Archive<'a>> {
    let mut files = BTreeMap::new();
    let mut reader = file;
    let mut archive = tar::Archive::new(&mut reader);
    for entry in archive.entries_with_seek().ok()? {
        let entry = entry.ok()?;
        let path = entry.path_bytes();
        let path = std::str::from_utf8(&path).ok()?;
        let name = path.trim_start_matches("./").trim_end_matches('/');
        let name = if name == "." { "" } else { name };
        if !belongs(name) || files.len() >= MOST_BLOBS {
            return None;
        }
        if entry.header().entry_type() == tar::EntryType::Regular {
            files.insert(name.to_owned(), (entry.raw_file_position(), entry.size()));
        }
    }
    (files.contains_key("oci-layout") && files.contains_key("index.json")).then_some(Archive {
        file,
        field,
        files,
    })
}

impl<'a> Archive<'a> {
    fn piece(&self, name: &str) -> Option<Piece<'a>> {
        let (at, left) = *self.files.get(name)?;
        Some(Piece { file: self.file, at, left })
    }

    fn document(&self, name: &str) -> Result<Vec<u8>> {
        let missing = || Error::invalid(self.field, format!("the archive has no {name}"));
        let piece = self.piece(name).ok_or_else(missing)?;
        if piece.left > DOCUMENT {
            return Err(Error::invalid(self.field, format!("{name} is larger than {DOCUMENT} bytes")));
        }
        let (mut text, wanted) = (vec![], piece.left);
        let mut piece = piece;
        piece.read_to_end(&mut text)?;
        if text.len() as u64 != wanted {
            return Err(self.cut());
        }
        Ok(text)
    }

    fn cut(&self) -> Error {
        Error::invalid(self.field, "the archive is cut off")
    }

    /// A blob whose content is what its digest says.
    fn verified(&self, of: &Descriptor) -> Result<Piece<'a>> {
        let hex = digest(self.field, &of.digest)?;
        let name = format!("blobs/sha256/{hex}");
        let missing = || Error::invalid(self.field, format!("the archive lacks the blob {}", of.digest));
        let piece = || self.piece(&name).ok_or_else(missing);
        let mut read = piece()?;
        if read.left != of.size {
            let text = format!("the blob {} has {} bytes, not {}", of.digest, read.left, of.size);
            return Err(Error::invalid(self.field, text));
        }
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 << 10]);
        loop {
            match read.read(&mut buffer) {
                Ok(0) if read.left > 0 => return Err(self.cut()),
                Ok(0) => break,
                Ok(n) => hash.update(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        if format!("{:x}", hash.finalize()) != hex {
            return Err(Error::invalid(
                self.field,
                format!("the blob {} is not what its digest says", of.digest),
            ));
        }
        piece()
    }

    fn blob(&self, of: &Descriptor) -> Result<Vec<u8>> {
        if of.size > DOCUMENT {
            return Err(Error::invalid(self.field, format!("the blob {} is too large", of.digest)));
        }
        let mut text = vec![];
        self.verified(of)?.read_to_end(&mut text)?;
        Ok(text)
    }
}

/// Unpacks `input` into `tree/` below `out` when it is an archive of a layout; `None` when it is something else.
///
/// # Errors
/// Invalid for anything wrong with it, quota when the disk is full.
pub fn unpack(input: &File, out: &Path, field: &str, bounds: Bounds) -> Result<Option<Found>> {
    let Some(archive) = open(input, field) else { return Ok(None) };
    let mut chosen = choose(field, &archive.document("index.json")?)?;
    let title = chosen.annotations.as_ref().and_then(|a| {
        a.get("io.containerd.image.name").or_else(|| a.get("org.opencontainers.image.ref.name")).cloned()
    });
    if is_index(&chosen.media_type) {
        chosen = choose(field, &archive.blob(&chosen)?)?;
    }
    let manifest = manifest(field, &archive.blob(&chosen)?)?;
    let image: Image = parse(field, "configuration", &archive.blob(&manifest.config)?)?;
    if image.os != "linux" && !image.os.is_empty() {
        let shown: String = image.os.chars().take(40).collect();
        return Err(Error::invalid(field, format!("the image is made for {shown:?}, not for linux")));
    }
    let mut layers = Layers::new(out, field, bounds)?;
    for layer in &manifest.layers {
        layers.apply(archive.verified(layer)?)?;
    }
    let runtime = image.config.unwrap_or_default();
    let application = application(&runtime, &layers, field)?;
    layers.complete()?;
    let labels = runtime.labels.unwrap_or_default();
    let label = |name: &str| labels.get(&format!("org.opencontainers.image.{name}")).cloned();
    let mut properties = Config::new();
    properties.insert("type".into(), "oci".into());
    let texts = [
        ("description", label("title").or(title)),
        ("version", label("version")),
        ("source", label("source")),
    ];
    for (key, text) in texts {
        if let Some(text) = text.filter(|t| !t.is_empty()) {
            properties.insert(key.into(), text.chars().filter(|c| !c.is_control()).take(255).collect());
        }
    }
    if let Some(signal) = application.stop_signal {
        let name = runtime.stop_signal.filter(|s| s.len() < 16).unwrap_or_else(|| signal.to_string());
        properties.insert("stop_signal".into(), name.trim().to_owned());
    }
    let created = image.created.and_then(|c| c.parse::<jiff::Timestamp>().ok());
    let found = layers.found();
    Ok(Some(Found {
        metadata: Some(Metadata {
            architecture: machine_name(&image.architecture).to_owned(),
            creation_date: created.map_or(0, |c| c.as_second().max(0)),
            expiry_date: 0,
            properties,
            templates: BTreeMap::new(),
        }),
        tree: true,
        digest: Some(digest(field, &chosen.digest)?.to_owned()),
        application: Some(application),
        ..found
    }))
}

/// What the image says of how it is run, with names of users in its own files looked up.
fn application(runtime: &Runtime, layers: &Layers, field: &str) -> Result<Application> {
    let words = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let command: Vec<String> = words(&runtime.entrypoint).into_iter().chain(words(&runtime.cmd)).collect();
    let long = command.iter().map(String::len).sum::<usize>() > 64 << 10;
    if long || command.iter().any(|w| w.contains(['\0', '\n'])) {
        return Err(Error::invalid(field, "the image's command is too long, or has line breaks in it"));
    }
    let mut environment = BTreeMap::new();
    for variable in words(&runtime.env) {
        if let Some((name, value)) = variable.split_once('=')
            && !name.is_empty()
        {
            if variable.len() > 32 << 10 || variable.contains(['\0', '\n', '\r']) {
                return Err(Error::invalid(field, format!("the image's variable {name:?} cannot be used")));
            }
            environment.insert(name.to_owned(), value.to_owned());
        }
    }
    let (uid, gid, home) = user(runtime.user.as_deref().unwrap_or_default(), layers, field)?;
    environment.entry("HOME".to_owned()).or_insert(home);
    let cwd = runtime.working_dir.clone().filter(|d| d.starts_with('/')).unwrap_or_else(|| "/".to_owned());
    // What is no signal here is none that could be sent.
    let stop_signal = runtime.stop_signal.as_deref().and_then(karst_model::signal::parse);
    Ok(Application { command, cwd, uid, gid, environment, stop_signal })
}

/// `user`, `uid`, `user:group`, `uid:gid`; answers ids and home.
fn user(text: &str, layers: &Layers, field: &str) -> Result<(u32, u32, String)> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let lines = |path: &str| -> Vec<Vec<String>> {
        let text = layers.read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines().map(|l| l.split(':').map(str::to_owned).collect()).collect()
    };
    let passwd = lines("etc/passwd");
    let number = |t: &str| t.parse::<u32>().ok().filter(|n| *n < 65_536);
    let cell = |line: &[String], n: usize| line.get(n).cloned().unwrap_or_default();
    let user = if user.is_empty() { "0" } else { user };
    let entry =
        passwd.iter().find(|l| cell(l, 0) == user).or_else(|| passwd.iter().find(|l| cell(l, 2) == user));
    let unknown = |what: &str| {
        let shown: String = what.chars().take(40).collect();
        Error::invalid(field, format!("the image runs as {shown:?}, whom it does not know"))
    };
    let uid =
        entry.and_then(|l| number(&cell(l, 2))).or_else(|| number(user)).ok_or_else(|| unknown(user))?;
    let gid = match group {
        None => entry.and_then(|l| number(&cell(l, 3))).unwrap_or(0),
        Some(group) => lines("etc/group")
            .iter()
            .find(|l| cell(l, 0) == group)
            .and_then(|l| number(&cell(l, 2)))
            .or_else(|| number(group))
            .ok_or_else(|| unknown(group))?,
    };
    let home = entry.map(|l| cell(l, 5)).filter(|h| h.starts_with('/') && !h.contains(['\n', '\r', '\0']));
    Ok((uid, gid, home.unwrap_or_else(|| if uid == 0 { "/root".into() } else { "/".into() })))
}
