//! Appliances (OVA: a tar with an OVF description, DSP0243 of DMTF, and disks): which disk there is, and the disk itself. Runs
//! inside the worker; everything in the archive is foreign.

use crate::unpack::Bounds;
use karst_model::{Error, Result};
use quick_xml::{
    XmlVersion,
    events::{BytesStart, Event},
    reader::Reader,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, Write},
    path::Path,
};

/// Bytes of the description, and of the list of checksums.
const LARGEST: u64 = 1 << 20;
/// Elements within elements, and all events.
const DEEPEST: usize = 64;
const MOST_EVENTS: usize = 50_000;
/// Entries of the archive.
const MOST_ENTRIES: usize = 256;

/// What an appliance is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appliance {
    /// What its machine is called.
    pub name: String,
    /// What runs in it, in words.
    pub system: String,
    /// File of its disk.
    pub disk: String,
    /// The disk is compressed by gzip.
    pub gzip: bool,
}

/// What the worker writes on its standard output.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The disk lies in `/out/disk`.
    Done(Appliance),
    /// It is no appliance that can be taken.
    Failed(Error),
}

fn attributes(start: &BytesStart<'_>, wrong: &dyn Fn(String) -> Error) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|e| wrong(e.to_string()))?;
        let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|e| wrong(e.to_string()))?;
        let name: &str = attribute.key.as_ref();
        found.insert(local(name).to_owned(), value.into_owned());
    }
    Ok(found)
}

/// A name without its prefix.
fn local(name: &str) -> &str {
    name.rsplit(':').next().unwrap_or(name)
}

/// Reads a description.
///
/// # Errors
/// Invalid at `field`: it is malformed, or describes anything but one machine with one disk.
pub fn describe(field: &str, text: &str) -> Result<Appliance> {
    let wrong = |what: String| {
        let shown: String = what.chars().filter(|c| !c.is_control()).take(200).collect();
        Error::invalid(field, format!("the description of the appliance (OVF) cannot be read: {shown}"))
    };
    let mut reader = Reader::from_str(text);
    reader.config_mut().enable_all_checks(true);
    let mut open: Vec<String> = vec![];
    let (mut machines, mut found) = (0, Appliance::default());
    let mut files: BTreeMap<String, (String, bool)> = BTreeMap::new();
    let mut disks: Vec<String> = vec![];
    for n in 0.. {
        if n > MOST_EVENTS {
            return Err(wrong("it is too long".into()));
        }
        let event = reader.read_event().map_err(|e| wrong(e.to_string()))?;
        let (start, closed) = match event {
            Event::Start(start) => (start, false),
            Event::Empty(start) => (start, true),
            Event::End(_) => {
                open.pop();
                continue;
            }
            Event::Text(text) => {
                let path: Vec<&str> = open.iter().map(String::as_str).collect();
                let into = match path.as_slice() {
                    [.., "VirtualSystem", "Name"] => &mut found.name,
                    [.., "VirtualSystem", "OperatingSystemSection", "Description"] => &mut found.system,
                    _ => continue,
                };
                let text = text.xml10_content();
                into.extend(
                    text.trim().chars().filter(|c| !c.is_control()).take(200usize.saturating_sub(into.len())),
                );
                continue;
            }
            Event::DocType(_) => return Err(wrong("declarations of a document type are not taken".into())),
            Event::Eof => break,
            _ => continue,
        };
        let name = start.name();
        let name: &str = name.as_ref();
        let name = local(name).to_owned();
        match name.as_str() {
            "File" => {
                let a = attributes(&start, &wrong)?;
                let get = |k: &str| a.get(k).cloned().unwrap_or_default();
                if !get("chunkSize").is_empty() {
                    return Err(wrong("files in pieces are not taken".into()));
                }
                let gzip = match get("compression").as_str() {
                    "" | "identity" => false,
                    "gzip" => true,
                    other => return Err(wrong(format!("the compression {other:?} is not known"))),
                };
                files.insert(get("id"), (get("href"), gzip));
            }
            "Disk" if open.last().is_some_and(|p| p == "DiskSection") => {
                let a = attributes(&start, &wrong)?;
                if a.contains_key("parentRef") {
                    return Err(wrong("a disk is the difference to another one".into()));
                }
                // One without a file begins empty.
                disks.extend(a.get("fileRef").cloned());
            }
            "VirtualSystem" => machines += 1,
            _ => {}
        }
        if !closed {
            open.push(name);
            if open.len() > DEEPEST {
                return Err(wrong(format!("more than {DEEPEST} elements lie within each other")));
            }
        }
    }
    if !open.is_empty() {
        return Err(wrong("it ends too early".into()));
    }
    if machines != 1 {
        return Err(Error::invalid(field, format!("the appliance has {machines} machines; one is taken")));
    }
    let [disk] = disks.as_slice() else {
        let text = format!(
            "the appliance has {} disks; an image has one: unpack it with tar, and import the disks one by one",
            disks.len()
        );
        return Err(Error::invalid(field, text));
    };
    let (href, gzip) = files
        .remove(disk)
        .ok_or_else(|| wrong(format!("its disk is the file {disk:?}, which it does not list")))?;
    if href.is_empty() || href.len() > 255 || href.contains(['/', '\\', ':', '\0']) || href.starts_with('.') {
        return Err(wrong(format!("the file {href:?} does not lie beside it")));
    }
    Ok(Appliance { disk: href, gzip, ..found })
}

fn broken(field: &str) -> impl Fn(io::Error) -> Error + Copy + '_ {
    move |e| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => e.into(),
        _ => Error::invalid(field, "the appliance is corrupt or cut off").with_context(e),
    }
}

/// Puts the disk of an appliance into `out`, which must not be there.
///
/// # Errors
/// Invalid at `field`, saying what is wrong; quota when the disk is full.
pub fn extract(field: &str, mut input: File, out: &Path, bounds: Bounds) -> Result<Appliance> {
    let broken = broken(field);
    let (mut described, mut sums) = (None, String::new());
    let mut archive = tar::Archive::new(&input);
    for (n, entry) in archive.entries().map_err(broken)?.enumerate() {
        let mut entry = entry.map_err(broken)?;
        if n >= MOST_ENTRIES {
            return Err(Error::invalid(field, format!("the appliance has more than {MOST_ENTRIES} files")));
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = path.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        let first = kind == "ovf" && described.is_none();
        if !first && kind != "mf" {
            continue;
        }
        if entry.size() > LARGEST {
            return Err(Error::invalid(field, format!("{path:?} of the appliance is larger than 1 MiB")));
        }
        let mut text = vec![];
        entry.by_ref().take(LARGEST).read_to_end(&mut text).map_err(broken)?;
        let text = String::from_utf8(text)
            .map_err(|_| Error::invalid(field, format!("{path:?} of the appliance is not UTF-8")))?;
        if first {
            described = Some(describe(field, &text)?);
        } else {
            sums = text;
        }
    }
    let none =
        || Error::invalid(field, "the file is no appliance (OVA): it is no tar archive with an .ovf in it");
    let appliance = described.ok_or_else(none)?;
    input.rewind()?;
    let mut archive = tar::Archive::new(&input);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if path.strip_prefix("./").unwrap_or(&path) != appliance.disk {
            continue;
        }
        if entry.header().entry_type() != tar::EntryType::Regular {
            return Err(Error::invalid(field, format!("{path:?} of the appliance is not a file")));
        }
        let size = entry.size();
        let mut hash = Hashed { inner: entry.by_ref(), hash: Sha256::new(), read: 0 };
        let mut disk = File::create_new(out)?;
        let limit =
            bounds.bytes.min(if appliance.gzip { size.saturating_mul(bounds.ratio) } else { u64::MAX });
        let written = if appliance.gzip {
            let unpacked = copy(flate2::read::GzDecoder::new(&mut hash), &mut disk, limit);
            io::copy(&mut hash, &mut io::sink()).map_err(broken)?;
            unpacked.map_err(broken)?
        } else {
            copy(&mut hash, &mut disk, limit).map_err(broken)?
        };
        if hash.read != size || written == 0 {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let sum = format!("{:x}", hash.hash.finalize());
        if let Some(wanted) = listed(&sums, &appliance.disk)
            && !wanted.eq_ignore_ascii_case(&sum)
        {
            let text = format!("{:?} is not what the appliance's list of checksums says", appliance.disk);
            return Err(Error::invalid(field, text));
        }
        return Ok(appliance);
    }
    Err(Error::invalid(field, format!("the appliance has no {:?}, which is its disk", appliance.disk)))
}

/// The SHA-256 that a list (`SHA256(name)= …`) has for a file.
fn listed<'a>(sums: &'a str, name: &str) -> Option<&'a str> {
    let of = format!("SHA256({name})");
    sums.lines().find_map(|line| {
        let (what, sum) = line.split_once('=')?;
        (what.trim().replace(' ', "") == of.replace(' ', "")).then(|| sum.trim())
    })
}

/// Copies at most `limit` bytes; answers how many. Runs of zeros become holes.
fn copy(mut from: impl Read, to: &mut File, limit: u64) -> io::Result<u64> {
    let mut buffer = vec![0u8; 256 << 10];
    let mut written = 0u64;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        written += n as u64;
        if written > limit {
            return Err(io::Error::other("the disk is implausibly large"));
        }
        if buffer[..n].iter().all(|b| *b == 0) {
            to.seek(io::SeekFrom::Current(n as i64))?;
        } else {
            to.write_all(&buffer[..n])?;
        }
    }
    to.set_len(written)?;
    Ok(written)
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
    read: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.read += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVF: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References><File ovf:href="d.vmdk" ovf:id="file1" ovf:size="9"/><File ovf:href="x.nvram" ovf:id="file2"/></References>
  <DiskSection><Info>Disks</Info><Disk ovf:capacity="1" ovf:diskId="d1" ovf:fileRef="file1"/></DiskSection>
  <VirtualSystem ovf:id="vm"><Info>A</Info><Name>Router &amp; more</Name>
    <OperatingSystemSection ovf:id="96"><Info>o</Info><Description>Debian 12</Description></OperatingSystemSection>
  </VirtualSystem>
</Envelope>"#;

    #[test]
    fn the_disk_of_a_description_is_found() {
        let found = describe("disk", OVF).unwrap();
        assert_eq!((found.disk.as_str(), found.system.as_str(), found.gzip), ("d.vmdk", "Debian 12", false));
        assert!(found.name.starts_with("Router"));
        assert!(
            describe("disk", &OVF.replace("ovf:size", "ovf:compression=\"gzip\" ovf:size")).unwrap().gzip
        );
        let second = "<Disk ovf:diskId='d2' ovf:fileRef='file2'/></DiskSection>";
        let deep = "<a>".repeat(100) + &"</a>".repeat(100);
        for (wrong, says) in [
            (OVF.replace("</DiskSection>", second), "2 disks"),
            (OVF.replace("ovf:fileRef=\"file1\"", ""), "0 disks"),
            (OVF.replace("fileRef=\"file1\"", "fileRef=\"file7\""), "does not list"),
            (OVF.replace("d.vmdk", "../d.vmdk"), "beside"),
            (OVF.replace("d.vmdk", "http://x/d.vmdk"), "beside"),
            (OVF.replace("d.vmdk", "/etc/shadow"), "beside"),
            (OVF.replace("ovf:capacity", "ovf:parentRef=\"d0\" ovf:capacity"), "difference"),
            (OVF.replace("ovf:size", "ovf:chunkSize=\"1\" ovf:size"), "pieces"),
            (OVF.replace("<VirtualSystem ", "<VirtualSystem/><VirtualSystem "), "2 machines"),
            (
                OVF.replace("<?xml version=\"1.0\"?>", "<!DOCTYPE a [<!ENTITY x SYSTEM '/etc/passwd'>]>"),
                "document type",
            ),
            (OVF[..OVF.len() - 20].to_owned(), "cannot be read"),
            (OVF.replace("<Info>A</Info>", &deep), "within each other"),
            ("<a/>".repeat(MOST_EVENTS + 2), "too long"),
            ("no xml".to_owned(), "0 machines"),
        ] {
            let e = describe("disk", &wrong).unwrap_err();
            assert!(e.message.contains(says) && e.is(karst_model::ErrorKind::Invalid), "{says}: {e}");
        }
    }

    fn archive(files: &[(&str, &[u8])]) -> File {
        let mut out = tar::Builder::new(tempfile::tempfile().unwrap());
        for (name, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            out.append_data(&mut header, name, *data).unwrap();
        }
        let mut file = out.into_inner().unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn the_disk_comes_out_whole_or_not_at_all() {
        let disk = [vec![7u8; 5000], vec![0; 600_000], vec![9; 100]].concat();
        let sum = format!("SHA256(d.vmdk)= {:x}\n", Sha256::digest(&disk));
        let place = tempfile::tempdir().unwrap();
        let run = |file: File, bounds: Bounds| {
            let out = place.path().join("disk");
            let outcome = extract("disk", file, &out, bounds).map(|_| std::fs::read(&out).unwrap());
            let _ = std::fs::remove_file(&out);
            outcome
        };
        let all: [(&str, &[u8]); 3] =
            [("a.ovf", OVF.as_bytes()), ("d.vmdk", &disk), ("a.mf", sum.as_bytes())];
        assert_eq!(run(archive(&all), Bounds::default()).unwrap(), disk);
        let late = [all[1], all[0]];
        assert_eq!(run(archive(&late), Bounds::default()).unwrap(), disk, "in any order");
        let mut zipped = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        zipped.write_all(&disk).unwrap();
        let zipped = zipped.finish().unwrap();
        let ovf = OVF.replace("ovf:size", "ovf:compression=\"gzip\" ovf:size");
        let gzip = [("a.ovf", ovf.as_bytes()), ("d.vmdk", &zipped[..])];
        assert_eq!(run(archive(&gzip), Bounds::default()).unwrap(), disk);

        let cut = archive(&all[..2]);
        cut.set_len(4000).unwrap();
        let wrong_sum = sum.replace("= ", "= 0");
        let small = Bounds { bytes: 1000, ..Bounds::default() };
        for (file, bounds, says) in [
            (cut, Bounds::default(), "cut off"),
            (archive(&all[..1]), Bounds::default(), "has no"),
            (archive(&all[1..]), Bounds::default(), "no appliance"),
            (archive(&[all[0], all[1], ("a.mf", wrong_sum.as_bytes())]), Bounds::default(), "checksums"),
            (archive(&all), small, "corrupt"),
            (archive(&[gzip[0], ("d.vmdk", &zipped[..200])]), Bounds::default(), "cut off"),
            (archive(&[("a.ovf", &[0xff; 10]), all[1]]), Bounds::default(), "UTF-8"),
            (archive(&[("a.ovf", &vec![b' '; 2 << 20]), all[1]]), Bounds::default(), "1 MiB"),
        ] {
            let e = run(file, bounds).unwrap_err();
            assert!(e.message.contains(says) && e.is(karst_model::ErrorKind::Invalid), "{says}: {e}");
        }
    }
}
