//! The cloud-init seed: a small read-only ISO 9660 image labelled `cidata` (NoCloud).
//!
//! Written here rather than by a program: it is a few files, a start must not wait for another process, and user
//! data (which may hold secrets) stays out of argv and temporary files. ECMA-119, with lower-case names as Linux shows
//! them and Rock Ridge (IEEE P1282 `NM`, `PX`) so that other readers show them too.

use karst_model::{Error, Result, spec::CloudInit};

const SECTOR: usize = 2048;
/// Largest seed: cloud-init itself takes less.
const MAX: usize = 16 << 20;

/// What goes onto the seed: the instance's first-boot data and its host name, and `medium`, the guest agent with what
/// installs it. Users' own vendor data take the place of ours, which would install it.
///
/// # Errors
/// Too large when the data passes 16 MiB.
pub fn seed(cloud_init: &CloudInit, hostname: &str, medium: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    let text = |s: &Option<String>| s.clone().unwrap_or_default();
    // JSON is YAML; quoting is then nobody's guess.
    let meta = serde_json::json!({"instance-id": cloud_init.instance_id, "local-hostname": hostname});
    let mut user = text(&cloud_init.user_data);
    if user.trim().is_empty() {
        // Without a header line cloud-init warns about an unknown type.
        user = "#cloud-config\n{}\n".into();
    }
    let mut files = vec![("meta-data", format!("{meta}\n")), ("user-data", user)];
    for (name, data) in
        [("vendor-data", &cloud_init.vendor_data), ("network-config", &cloud_init.network_config)]
    {
        if let Some(data) = data.as_ref().filter(|d| !d.trim().is_empty()) {
            files.push((name, data.clone()));
        } else if name == "vendor-data" && !medium.is_empty() {
            files.push((name, karst_guest_agent::delivery::BOOTHOOK.to_owned()));
        }
    }
    if files.iter().map(|(_, d)| d.len()).sum::<usize>() > MAX {
        return Err(Error::too_large("the cloud-init data of a virtual machine may have 16 MiB at most")
            .at("config.cloud-init"));
    }
    let mut files: Vec<_> = files.iter().map(|(n, d)| (*n, d.as_bytes())).collect();
    files.extend(medium.iter().map(|(n, d)| (*n, d.as_slice())));
    Ok(iso9660("cidata", &files))
}

/// Both byte orders, as ECMA-119 7.3.3 stores numbers.
fn both32(n: u32) -> [u8; 8] {
    let mut b = [0; 8];
    b[..4].copy_from_slice(&n.to_le_bytes());
    b[4..].copy_from_slice(&n.to_be_bytes());
    b
}

fn both16(n: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (n.to_le_bytes(), n.to_be_bytes());
    [a, b, c, d]
}

/// A directory record with Rock Ridge fields (9.1).
fn record(
    name: &[u8],
    rock_ridge_name: Option<&str>,
    extent: u32,
    size: u32,
    directory: bool,
    root_dot: bool,
) -> Vec<u8> {
    let mut r = vec![0, 0];
    r.extend(both32(extent));
    r.extend(both32(size));
    // 2000-01-01, so that the same data gives the same image.
    r.extend([100, 1, 1, 0, 0, 0, 0]);
    r.extend([if directory { 2 } else { 0 }, 0, 0]);
    r.extend(both16(1));
    r.push(name.len() as u8);
    r.extend(name);
    if r.len() % 2 == 1 {
        r.push(0);
    }
    if root_dot {
        r.extend(b"SP\x07\x01\xbe\xef\x00");
        // Extension reference "RRIP_1991A".
        r.extend(b"ER\x12\x01\x0a\x00\x00\x01RRIP_1991A");
    }
    r.extend(b"PX\x24\x01");
    r.extend(both32(if directory { 0o040_555 } else { 0o100_444 }));
    r.extend(both32(1));
    r.extend([both32(0), both32(0)].concat());
    if let Some(n) = rock_ridge_name {
        r.extend(b"NM");
        r.extend([5 + n.len() as u8, 1, 0]);
        r.extend(n.as_bytes());
    }
    if r.len() % 2 == 1 {
        r.push(0);
    }
    r[0] = r.len() as u8;
    r
}

/// An image with `files` in its root; names are short and all records fit one sector.
fn iso9660(label: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    // 0..16 system area, 16 primary descriptor, 17 terminator, 18 and 19 path tables, 20 root directory, then the files.
    const ROOT: u32 = 20;
    let mut next = ROOT + 1;
    let mut extents = vec![];
    for (_, data) in files {
        extents.push(next);
        next += data.len().div_ceil(SECTOR).max(1) as u32;
    }
    let total = next;

    let mut root = record(&[0], None, ROOT, SECTOR as u32, true, true);
    root.extend(record(&[1], None, ROOT, SECTOR as u32, true, false));
    // 9.3: records are ordered by name.
    let mut order: Vec<usize> = (0..files.len()).collect();
    order.sort_by_key(|i| files[*i].0);
    for i in order {
        let (name, data) = files[i];
        root.extend(record(name.as_bytes(), Some(name), extents[i], data.len() as u32, false, false));
    }
    debug_assert!(root.len() <= SECTOR);

    let path_table = |extent: [u8; 4], parent: [u8; 2]| [&[1, 0][..], &extent, &parent, &[0, 0]].concat();
    let padded = |s: &str, n: usize| {
        let mut v = s.as_bytes().to_vec();
        v.resize(n, b' ');
        v
    };
    let mut pvd = b"\x01CD001\x01\x00".to_vec();
    pvd.extend(padded("LINUX", 32));
    pvd.extend(padded(label, 32));
    pvd.extend([0; 8]);
    pvd.extend(both32(total));
    pvd.extend([0; 32]);
    pvd.extend([both16(1), both16(1), both16(SECTOR as u16)].concat());
    pvd.extend(both32(10));
    pvd.extend(18u32.to_le_bytes());
    pvd.extend([0; 4]);
    pvd.extend(19u32.to_be_bytes());
    pvd.extend([0; 4]);
    let mut dot = vec![34, 0];
    dot.extend([both32(ROOT), both32(SECTOR as u32)].concat());
    dot.extend([100, 1, 1, 0, 0, 0, 0, 2, 0, 0]);
    dot.extend(both16(1));
    dot.extend([1, 0]);
    pvd.extend(dot);
    pvd.extend(padded("", 4 * 128 + 3 * 37));
    for _ in 0..4 {
        pvd.extend(b"0000000000000000\x00");
    }
    pvd.push(1);

    let mut image = vec![0; total as usize * SECTOR];
    let mut put = |sector: u32, data: &[u8]| {
        let at = sector as usize * SECTOR;
        image[at..at + data.len()].copy_from_slice(data);
    };
    put(16, &pvd);
    put(17, b"\xffCD001\x01");
    put(18, &path_table(ROOT.to_le_bytes(), 1u16.to_le_bytes()));
    put(19, &path_table(ROOT.to_be_bytes(), 1u16.to_be_bytes()));
    put(ROOT, &root);
    for (i, (_, data)) in files.iter().enumerate() {
        put(extents[i], data);
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> CloudInit {
        CloudInit {
            instance_id: "i-1".into(),
            user_data: Some("#cloud-config\npassword: x\n".repeat(200)),
            vendor_data: None,
            network_config: Some("version: 2\n".into()),
        }
    }

    #[test]
    fn an_independent_reader_finds_label_names_and_content() {
        if !std::path::Path::new("/usr/bin/xorriso").exists() {
            return crate::backends::missing("xorriso is not installed");
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("seed.iso");
        std::fs::write(&image, seed(&data(), "v1", &[("incus-agent", vec![7; 5000])]).unwrap()).unwrap();
        let out = std::process::Command::new("xorriso")
            .args(["-osirrox", "on", "-indev"])
            .arg(&image)
            .args(["-pvd_info", "-extract", "/"])
            .arg(dir.path().join("out"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(out.status.success() && text.contains("Volume Id    : cidata"), "{text}");
        let read = |n: &str| std::fs::read_to_string(dir.path().join("out").join(n)).unwrap();
        assert_eq!(read("user-data"), data().user_data.unwrap());
        assert_eq!(read("meta-data"), "{\"instance-id\":\"i-1\",\"local-hostname\":\"v1\"}\n");
        assert_eq!(read("network-config"), "version: 2\n");
        assert!(read("vendor-data").starts_with("#cloud-boothook"));
        assert_eq!(std::fs::read(dir.path().join("out/incus-agent")).unwrap(), [7; 5000]);
    }

    #[test]
    fn quoting_in_names_cannot_add_meta_data() {
        let mut c = data();
        c.instance_id = "x\"\nevil: y".into();
        let image = seed(&c, "v1", &[]).unwrap();
        let text = String::from_utf8_lossy(&image);
        assert!(text.contains("x\\\"\\nevil: y") && !text.contains("\nevil"));
    }
}
