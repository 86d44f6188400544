//! Backups in Incus' format: packing one and reading one, the parts that run inside the worker.
//!
//! A file is packed by several workers in turn, one for each content. What each writes is a complete member of the
//! compressed stream (gzip, zstd, xz and bzip2 files may consist of several), and only the last one writes the end mark of
//! the tar archive: so a worker is granted one content at a time, and their number has no bound.

use crate::pack::Packer;
use karst_model::{Error, Result, backup::Compression};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

/// Largest `index.yaml` that is read, and what may become of it.
const INDEX: u64 = 4 << 20;
const ANSWER: usize = 1 << 20;
/// Most threads that compress one content.
const PACKERS: usize = 4;

/// One piece of a backup.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Piece {
    /// Directories and texts that come first: path in the archive, content (`None`: a directory).
    pub texts: Vec<(String, Option<String>)>,
    /// The content: its path in the archive. A tree is granted as `/tree`, a raw disk as `/disk.img`.
    pub content: Option<(String, Kind)>,
    /// How it is compressed.
    pub compression: Compression,
    /// It is the last one.
    pub last: bool,
}

/// What a content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A tree.
    Tree,
    /// A disk.
    Disk,
}

/// Packs a piece into `out`; answers `out`.
///
/// # Errors
/// The content cannot be read; the disk is full.
pub fn pack(piece: &Piece, tree: &Path, disk: &Path, out: File) -> Result<File> {
    let buffered = io::BufWriter::with_capacity(256 << 10, out);
    let fill = |out: &mut dyn Write| -> Result<()> {
        let mut out = io::BufWriter::with_capacity(256 << 10, out);
        for (path, text) in &piece.texts {
            Packer::text(&mut out, path, text.as_deref())?;
        }
        match &piece.content {
            Some((path, Kind::Tree)) => crate::pack::pack_below(tree, path, &mut out)?,
            Some((path, Kind::Disk)) => Packer::disk(&mut out, path, &File::open(disk)?)?,
            None => {}
        }
        if piece.last {
            out.write_all(&[0; 1024])?;
        }
        Ok(out.flush()?)
    };
    let done = match piece.compression {
        Compression::None => {
            let mut out = buffered;
            fill(&mut out)?;
            out
        }
        Compression::Gzip => {
            let mut out = flate2::write::GzEncoder::new(buffered, flate2::Compression::new(4));
            fill(&mut out)?;
            out.finish()?
        }
        Compression::Zstd => {
            let mut out = zstd::stream::write::Encoder::new(buffered, 3)?;
            // Beside the one that reads. What one thread would write decompresses to the same.
            out.multithread(std::thread::available_parallelism().map_or(1, |n| n.get().min(PACKERS) as u32))?;
            fill(&mut out)?;
            out.finish()?
        }
        Compression::Xz => {
            let mut out = xz2::write::XzEncoder::new(buffered, 6);
            fill(&mut out)?;
            out.finish()?
        }
        Compression::Bzip2 => {
            let mut out = bzip2::write::BzEncoder::new(buffered, bzip2::Compression::best());
            fill(&mut out)?;
            out.finish()?
        }
    };
    done.into_inner().map_err(|e| e.into_error().into())
}

/// Reads `backup/index.yaml`, which comes first, and answers it as JSON, without what is expanded in it.
///
/// # Errors
/// Invalid at `field`: no backup, or one that nobody would write.
pub fn index(input: impl Read, field: &str) -> Result<serde_json::Value> {
    let corrupt = |e: io::Error| Error::invalid(field, "the backup is corrupt or cut off").with_context(e);
    let mut archive = tar::Archive::new(crate::unpack::decompress(input, field)?);
    // Incus writes it first; a few entries of grace.
    for entry in archive.entries().map_err(corrupt)?.take(64) {
        let entry = entry.map_err(corrupt)?;
        if entry.path_bytes().as_ref() != b"backup/index.yaml" {
            continue;
        }
        if entry.size() > INDEX {
            return Err(Error::invalid(field, "index.yaml of the backup is too large"));
        }
        let mut text = vec![];
        entry.take(INDEX).read_to_end(&mut text).map_err(corrupt)?;
        let unreadable = |e: &dyn std::fmt::Display| {
            Error::invalid(field, "index.yaml of the backup cannot be read").with_context(e)
        };
        let value: serde_yaml_ng::Value = serde_yaml_ng::from_slice(&text).map_err(|e| unreadable(&e))?;
        let mut value = serde_json::to_value(value).map_err(|e| unreadable(&e))?;
        strip(&mut value);
        if serde_json::to_vec(&value)?.len() > ANSWER - 1024 {
            return Err(Error::invalid(field, "index.yaml of the backup is too large"));
        }
        return Ok(value);
    }
    Err(Error::invalid(field, "the file is not a backup: it does not begin with backup/index.yaml"))
}

/// What is expanded can be told from the rest, and is most of it.
fn strip(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            map.retain(|k, _| !k.starts_with("expanded_"));
            map.values_mut().for_each(strip);
        }
        serde_json::Value::Array(all) => all.iter_mut().for_each(strip),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unpack::{Bounds, Part, Task, unpack};
    use std::{
        io::Seek,
        os::unix::fs::{FileExt, MetadataExt},
    };

    fn packed(compression: Compression) -> (tempfile::TempDir, File) {
        let d = tempfile::tempdir().unwrap();
        let tree = d.path().join("tree");
        std::fs::create_dir_all(tree.join("etc")).unwrap();
        std::fs::write(tree.join("etc/hostname"), "one").unwrap();
        std::fs::hard_link(tree.join("etc/hostname"), tree.join("second")).unwrap();
        let disk = File::create(d.path().join("disk.img")).unwrap();
        disk.set_len(64 << 20).unwrap();
        for n in 0..30u64 {
            disk.write_all_at(&[n as u8 + 1; 4096], n * (2 << 20)).unwrap();
        }
        let texts =
            vec![("backup/index.yaml".to_owned(), Some("name: c1\nexpanded_config: {a: b}\n".to_owned()))];
        let first = Piece {
            texts,
            content: Some(("backup/container/rootfs".into(), Kind::Tree)),
            compression,
            last: false,
        };
        let last = Piece {
            texts: vec![],
            content: Some(("backup/volume.img".into(), Kind::Disk)),
            compression,
            last: true,
        };
        let mut out = tempfile::tempfile().unwrap();
        for piece in [first, last] {
            out = pack(&piece, &tree, &d.path().join("disk.img"), out).unwrap();
        }
        out.rewind().unwrap();
        (d, out)
    }

    fn task(part: Part, within: &str) -> Task {
        Task {
            part,
            bounds: Bounds::default(),
            field: "backup".into(),
            within: Some(within.into()),
            beside: None,
            machine: None,
        }
    }

    #[test]
    fn what_is_packed_comes_out_again_however_it_was_compressed() {
        for compression in
            [Compression::None, Compression::Gzip, Compression::Zstd, Compression::Xz, Compression::Bzip2]
        {
            let (d, mut file) = packed(compression);
            assert_eq!(index(&file, "backup").unwrap(), serde_json::json!({"name": "c1"}), "{compression:?}");
            file.rewind().unwrap();
            let out = d.path().join("out");
            std::fs::create_dir(&out).unwrap();
            unpack(&file, &out, &task(Part::Root, "backup/container/rootfs")).unwrap();
            assert_eq!(std::fs::read(out.join("tree/second")).unwrap(), b"one");
            assert_eq!(std::fs::metadata(out.join("tree/second")).unwrap().nlink(), 2);
            file.rewind().unwrap();
            unpack(&file, &out, &task(Part::Disk, "backup/volume.img")).unwrap();
            let (was, is) = (d.path().join("disk.img"), out.join("disk.img"));
            assert!(std::fs::read(was).unwrap() == std::fs::read(&is).unwrap(), "{compression:?}");
            assert!(std::fs::metadata(&is).unwrap().blocks() * 512 < 1 << 20, "holes stay holes");
            file.rewind().unwrap();
            let e = unpack(&file, &out, &task(Part::Disk, "backup/none.img")).unwrap_err();
            assert!(e.message.contains("backup/none.img"), "{e}");
        }
    }

    #[test]
    fn gnu_tar_reads_it_too() {
        let (d, file) = packed(Compression::Zstd);
        let plain = d.path().join("plain.tar");
        std::fs::write(&plain, zstd::stream::decode_all(&file).unwrap()).unwrap();
        let listed = std::process::Command::new("tar").arg("tvf").arg(&plain).output().unwrap();
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.status.success() && listed.stderr.is_empty(), "{listed:?}");
        assert!(
            text.contains(" 67108864 ") && text.contains("link to backup/container/rootfs/second"),
            "{text}"
        );
        let done = std::process::Command::new("tar")
            .arg("-xf")
            .arg(&plain)
            .arg("-C")
            .arg(d.path())
            .status()
            .unwrap();
        assert!(done.success());
        let (was, is) = (d.path().join("disk.img"), d.path().join("backup/volume.img"));
        assert!(std::fs::read(was).unwrap() == std::fs::read(is).unwrap());
    }

    #[test]
    fn what_is_no_backup_is_refused() {
        for wrong in [&b""[..], &b"hello"[..], &[0u8; 4096][..], &[0x1f, 0x8b, 8, 0, 1, 2][..]] {
            assert!(index(wrong, "backup").unwrap_err().is(karst_model::ErrorKind::Invalid));
        }
        let (_d, mut file) = packed(Compression::Gzip);
        let length = file.seek(io::SeekFrom::End(0)).unwrap();
        for cut in [10, length / 2, length - 9] {
            file.rewind().unwrap();
            let out = tempfile::tempdir().unwrap();
            let cut = (&file).take(cut);
            let e = unpack(cut, out.path(), &task(Part::Root, "backup/container/rootfs")).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Invalid), "{e}");
        }
    }
}
