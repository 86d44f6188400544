//! Domain documents of others, as many as a directory holds: which are accepted, which refused and for what, and which of the
//! accepted are shown again in the same meaning.
//!
//! libvirt's own are not part of this repository: `cargo xtask corpus DIR` names the directory (`tests/qemuxml2argvdata` of its
//! source package), and the result is written into `docs/reference`. What a document refers to is made before: networks, pools
//! and volumes. Whether QEMU takes the machine that is made of it is not asked here: the host is simulated.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::{
    host::number,
    support::{Client, Refused, Server, argument},
};
use karst_frontend_libvirt::{
    error::Code,
    xdr::Reader,
    xml::{
        Element,
        machine::{Machine, Opaque, Source, read},
        read::document,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::Path,
};

/// Where the directory stands.
const DIRECTORY: &str = "KARST_LIBVIRT_CORPUS";
/// Where the result is written.
const RESULT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/reference/libvirt-corpus.md");
/// Causes that are listed one by one.
const CAUSES: usize = 40;
/// Secure and inactive.
const SHOWN: u32 = 1 | 2;
/// With managed save, snapshots, NVRAM, checkpoints and TPM.
const UNDEFINED: u32 = 1 | 2 | 4 | 16 | 32;

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Cause {
    /// What is said, without the names and numbers of one document.
    text: String,
    /// It names an element or attribute of the document, or one that it lacks.
    named: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Refused(Cause),
    /// With what is not the same when it is shown.
    Accepted(Option<String>),
}

/// A document.
struct Counted {
    name: String,
    /// libvirt makes a command line of QEMU of it: what it refuses itself need not be taken.
    usable: bool,
    outcome: Outcome,
}

fn is_x86(text: &str) -> bool {
    match document(text) {
        Ok(root) => {
            let arch = root.find("os").and_then(|os| os.find("type")).and_then(|t| t.attribute("arch"));
            root.name() == "domain" && matches!(arch, None | Some("x86_64" | "i686"))
        }
        // What cannot be read at all is told by its words.
        Err(_) => text.contains("arch='x86_64'") || text.contains("arch='i686'"),
    }
}

async fn define(client: &mut Client, xml: &str) -> Result<(), Refused> {
    let text = argument(|w| {
        w.string(xml).u32(0);
    });
    client.call(350, &text).await.map(drop)
}

async fn shown(client: &mut Client, name: &str) -> String {
    let domain = client.domain(name).await;
    let payload = client.call(14, &[&domain[..], &SHOWN.to_be_bytes()].concat()).await.unwrap();
    Reader::new(&payload).string().unwrap()
}

/// Makes what a document refers to, once. What cannot be made is missed by the document.
async fn provide(client: &mut Client, root: &Element, made: &mut BTreeSet<String>) {
    let Some(devices) = root.find("devices") else { return };
    let named = |e: &Element, name: &str| e.find("source")?.attribute(name).map(str::to_owned);
    for nic in devices.all("interface") {
        let network = named(nic, "network").or_else(|| named(nic, "bridge"));
        let Some(network) = network.filter(|n| made.insert(format!("network {n}"))) else { continue };
        let new = Element::new("network").child(Element::text("name", network)).document();
        let text = argument(|w| {
            w.string(&new);
        });
        let _ = client.call(41, &text).await;
    }
    for disk in devices.all("disk") {
        let places = [disk.find("encryption"), disk.find("source").and_then(|s| s.find("encryption"))];
        let secrets = places.into_iter().flatten().flat_map(|e| e.all("secret"));
        for usage in secrets.filter_map(|s| s.attribute("usage")) {
            if made.insert(format!("secret {usage}")) {
                let usage =
                    Element::new("usage").with("type", "volume").child(Element::text("volume", usage));
                let new = Element::new("secret").child(usage).document();
                let text = argument(|w| {
                    w.string(&new).u32(0);
                });
                let _ = client.call(number("SECRET_DEFINE_XML"), &text).await;
            }
        }
    }
    for disk in devices.all("disk").filter(|d| d.attribute("type") == Some("volume")) {
        let (Some(pool), Some(volume)) = (named(disk, "pool"), named(disk, "volume")) else { continue };
        let name = |name: &str| {
            argument(|w| {
                w.string(name);
            })
        };
        if made.insert(format!("pool {pool}")) && client.call(84, &name(&pool)).await.is_err() {
            let new = Element::new("pool").with("type", "dir").child(Element::text("name", &pool)).document();
            let text = argument(|w| {
                w.string(&new).u32(0);
            });
            if let Ok(defined) = client.call(77, &text).await {
                let _ = client.call(78, &[defined, vec![0; 4]].concat()).await;
            }
        }
        let Ok(found) = client.call(84, &name(&pool)).await else { continue };
        if made.insert(format!("volume {pool} {volume}")) {
            let format = if disk.attribute("device") == Some("cdrom") { "iso" } else { "raw" };
            let new = Element::new("volume")
                .child(Element::text("name", volume))
                .child(Element::text("capacity", 1).with("unit", "MiB"))
                .child(Element::new("target").child(Element::new("format").with("type", format)));
            let text = argument(|w| {
                w.string(&new.document()).u32(0);
            });
            let _ = client.call(93, &[found, text].concat()).await;
        }
    }
}

/// Names of elements and attributes of a document.
fn vocabulary(e: &Element, all: &mut BTreeSet<String>) {
    all.insert(e.name().to_owned());
    all.extend(e.attributes().map(|(name, _)| name.to_owned()));
    e.elements().iter().for_each(|inner| vocabulary(inner, all));
}

fn cause(root: Option<&Element>, (code, message): Refused) -> Cause {
    let mut words = BTreeSet::new();
    if let Some(root) = root {
        vocabulary(root, &mut words);
    }
    // Each document has them, so that they name nothing.
    for general in ["name", "type", "device", "devices", "domain", "id"] {
        words.remove(general);
    }
    let (_, said) = message.split_once(": ").unwrap_or(("", message.as_str()));
    let named = match said.split_once(": ") {
        // The label is the element, or element and attribute; of an element that is not there it tells that it is missing.
        Some((label, _)) if code == Code::ConfigUnsupported as i32 => {
            let first = label.split_whitespace().next().unwrap_or_default();
            label.starts_with("domain ") || words.contains(first) || !label.contains(' ')
        }
        // It names what the document lacks.
        _ if said.starts_with("missing ") && said.ends_with(" element") => true,
        _ => said
            .split(|c: char| !c.is_ascii_alphanumeric() && !"_:-".contains(c))
            .any(|word| words.contains(word)),
    };
    // A path of this machine or that, a name, a number: the same cause.
    let mut text = String::new();
    let mut quoted = false;
    for c in said.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                text.push_str(if quoted { "'…" } else { "'" });
            }
            _ if quoted => {}
            c if c.is_ascii_digit() => {
                if !text.ends_with('#') {
                    text.push('#');
                }
            }
            c => text.push(c),
        }
    }
    let words = text.split(' ').map(|word| if word.starts_with('/') { "PATH" } else { word });
    Cause { text: words.collect::<Vec<_>>().join(" "), named }
}

/// Is all that was given in what is shown? Attributes and elements that are `apart` are compared by their meaning.
fn holds(shown: &Element, given: &Element, apart: &[&str]) -> Result<(), String> {
    for (name, value) in given.attributes().filter(|(n, _)| !apart.contains(n)) {
        if shown.attribute(name) != Some(value) {
            let now = shown.attribute(name).unwrap_or("nothing");
            return Err(format!("<{} {name}='{value}'> became {now}", given.name()));
        }
    }
    if given.body().trim() != shown.body().trim() {
        return Err(format!("<{}>{}</> became {}", given.name(), given.body(), shown.body()));
    }
    for inner in given.elements().iter().filter(|e| !apart.contains(&e.name())) {
        let mut why = format!("<{}> of <{}> is gone", inner.name(), given.name());
        let there = shown.all(inner.name()).any(|s| match holds(s, inner, &[]) {
            Ok(()) => true,
            Err(e) => {
                why = e;
                false
            }
        });
        if !there {
            return Err(why);
        }
    }
    Ok(())
}

fn opaque(given: &Machine, kept: &Machine) -> Result<(), String> {
    let Opaque { domain, devices, disks, nics } = &given.opaque;
    let any = |of: &[Element], e: &Element, apart: &[&str]| {
        let mut why = Err(format!("<{}> is gone", e.name()));
        for same in of.iter().filter(|k| k.name() == e.name()) {
            why = holds(same, e, apart);
            if why.is_ok() {
                break;
            }
        }
        why
    };
    for e in domain {
        // The type has the machine's version, the kernel is compared by its meaning, and so are CPUs.
        let apart: &[&str] = match e.name() {
            "os" => &["type", "kernel", "initrd", "cmdline"],
            "vcpu" => &["cpuset", "current"],
            _ => &[],
        };
        any(&kept.opaque.domain, e, apart)?;
    }
    for e in devices {
        any(&kept.opaque.devices, e, &[])?;
    }
    for (at, e) in disks {
        let same = kept.opaque.disks.get(at).ok_or_else(|| format!("disk {at} is gone"))?;
        holds(same, e, &["type", "source", "target", "readonly", "boot", "alias", "address"])?;
    }
    for (at, e) in nics {
        let by_order = at.parse().ok().and_then(|n: usize| kept.nics.get(n)?.mac.as_ref());
        let same = kept.opaque.nics.get(by_order.unwrap_or(at));
        let same = same.ok_or_else(|| format!("interface {at} is gone"))?;
        holds(same, e, &["type", "mac", "source", "target", "model", "boot", "alias", "address"])?;
    }
    Ok(())
}

/// What is not the same, apart from what a definition leaves to the host: addresses, the version of a machine type.
fn difference(given: &Machine, kept: &Machine) -> Result<(), String> {
    opaque(given, kept)?;
    let (mut given, mut kept) = (given.clone(), kept.clone());
    (given.opaque, kept.opaque) = (Opaque::default(), Opaque::default());
    given.kvm = kept.kvm;
    given.uuid = given.uuid.or(kept.uuid);
    let family = match given.machine.as_deref() {
        None | Some("pc") => Some("pc-i440fx-"),
        Some("q35") => Some("pc-q35-"),
        Some(_) => None,
    };
    if family.is_some_and(|f| kept.machine.as_ref().is_some_and(|m| m.starts_with(f))) {
        given.machine.clone_from(&kept.machine);
    }
    given.disks.sort_by(|a, b| a.target.cmp(&b.target));
    kept.disks.sort_by(|a, b| a.target.cmp(&b.target));
    for (given, kept) in given.disks.iter_mut().zip(&kept.disks) {
        given.pci = given.pci.take().or_else(|| kept.pci.clone());
    }
    for (given, kept) in given.nics.iter_mut().zip(&kept.nics) {
        given.pci = given.pci.take().or_else(|| kept.pci.clone());
        given.mac = given.mac.take().or_else(|| kept.mac.clone());
    }
    macro_rules! same {
        ($($field:ident)*) => {$(
            if given.$field != kept.$field {
                let (was, is) = (&given.$field, &kept.$field);
                return Err(format!("{}: {was:?} became {is:?}", stringify!($field)));
            }
        )*};
    }
    same!(memory current cpus most_cpus pinned tuning machine firmware boot_menu cpu_model restarts preserved ends_on_reboot disks nics);
    if given == kept { Ok(()) } else { Err(format!("{given:?} became {kept:?}")) }
}

/// Defines it, looks at it, defines what was shown, and takes it away.
async fn tried(client: &mut Client, text: &str, made: &mut BTreeSet<String>) -> Outcome {
    let root = document(text).ok();
    if let Some(root) = &root {
        provide(client, root, made).await;
    }
    if let Err(refused) = define(client, text).await {
        return Outcome::Refused(cause(root.as_ref(), refused));
    }
    let given = read::machine(text).expect("what is defined was read");
    let first = shown(client, &given.name).await;
    let mut result = match read::machine(&first) {
        Ok(kept) => difference(&given, &kept),
        Err(e) => Err(format!("what is shown is refused: {}", e.message())),
    };
    if result.is_ok() {
        result = define(client, &first).await.map_err(|(_, e)| format!("what is shown is refused: {e}"));
    }
    if result.is_ok() && shown(client, &given.name).await != first {
        result = Err("what is shown becomes something else when it is defined".into());
    }
    let domain = client.domain(&given.name).await;
    let gone = client.call(231, &[&domain[..], &UNDEFINED.to_be_bytes()].concat()).await;
    assert_eq!(gone.map(drop), Ok(()), "{}", given.name);
    Outcome::Accepted(result.err())
}

async fn count(directory: &Path) -> Vec<Counted> {
    let server = Server::start().await;
    let mut client = server.open("full", "qemu:///system").await;
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let commands: Vec<&str> = names.iter().filter_map(|n| n.strip_suffix(".args")).collect();
    let (mut all, mut made) = (vec![], BTreeSet::new());
    for name in names.iter().filter_map(|n| n.strip_suffix(".xml")) {
        let text = std::fs::read_to_string(directory.join(format!("{name}.xml"))).unwrap();
        if !is_x86(&text) {
            continue;
        }
        // Also those of one architecture or version each: NAME.x86_64-latest.args.
        let of = |c: &&str| *c == name || c.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
        let usable = commands.iter().any(of);
        let outcome = tried(&mut client, &text, &mut made).await;
        all.push(Counted { name: name.to_owned(), usable, outcome });
    }
    all
}

/// Of documents: how many there are, are accepted, are the same in meaning, are refused without a word of theirs.
fn numbers<'a>(all: impl Iterator<Item = &'a Counted>) -> [usize; 4] {
    let mut n = [0; 4];
    for one in all {
        n[0] += 1;
        match &one.outcome {
            Outcome::Accepted(difference) => {
                n[1] += 1;
                n[2] += usize::from(difference.is_none());
            }
            Outcome::Refused(cause) => n[3] += usize::from(!cause.named),
        }
    }
    n
}

fn percent(part: usize, of: usize) -> String {
    format!("{:.0}%", 100.0 * part as f64 / of.max(1) as f64)
}

fn report(all: &[Counted]) -> String {
    let mut text = String::from(
        "# libvirt's domain documents\n\nThe x86 documents of `tests/qemuxml2argvdata` of libvirt's source package, each defined on \
         a simulated host, shown, defined again as it was shown, and undefined. Made by `cargo xtask corpus DIR`; the documents \
         are not part of this repository. What they refer to (networks, pools, volumes) is made before.\n\n\
         The same in meaning: all that was given is shown, and what is shown defines the same. Usable: libvirt makes a command \
         line of QEMU of it; the others are there to be refused, or for other tests.\n\n\
         | | documents | accepted | of these the same in meaning | refused | of these without an element named |\n\
         |---|---|---|---|---|---|\n",
    );
    for (what, usable) in [("usable", true), ("others", false)] {
        let [n, accepted, same, unnamed] = numbers(all.iter().filter(|c| c.usable == usable));
        let (a, s) = (percent(accepted, n), percent(same, accepted));
        let refused = n - accepted;
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {what} | {n} | {accepted} ({a}) | {same} ({s}) | {refused} | {unnamed} |");
    }
    let mut causes: BTreeMap<&Cause, usize> = BTreeMap::new();
    for one in all.iter().filter(|c| c.usable) {
        if let Outcome::Refused(cause) = &one.outcome {
            *causes.entry(cause).or_default() += 1;
        }
    }
    let mut causes: Vec<_> = causes.into_iter().collect();
    causes.sort_by_key(|(cause, n)| (std::cmp::Reverse(*n), *cause));
    text += "\n## Why usable ones are refused\n\nThe first cause of each; there may be more.\n\n| documents | cause |\n|---|---|\n";
    for (cause, n) in causes.iter().take(CAUSES) {
        let unnamed = if cause.named { "" } else { " (names no element)" };
        let _ = writeln!(text, "| {n} | {}{unnamed} |", cause.text.replace('|', "\\|"));
    }
    let rest: usize = causes.iter().skip(CAUSES).map(|(_, n)| n).sum();
    if rest > 0 {
        let _ = writeln!(text, "| {rest} | others |");
    }
    let different = all.iter().filter_map(|c| match &c.outcome {
        Outcome::Accepted(Some(difference)) => Some((&c.name, difference)),
        _ => None,
    });
    let mut lines = String::new();
    for (name, difference) in different {
        let _ = writeln!(lines, "- `{name}`: {}", difference.chars().take(300).collect::<String>());
    }
    if !lines.is_empty() {
        text += "\n## Accepted, and not shown in the same meaning\n\n";
        text += &lines;
    }
    text
}

/// How many usable ones there were, were accepted and were the same, by a report.
fn before(report: &str) -> Option<[usize; 3]> {
    let row = report.lines().find_map(|l| l.strip_prefix("| usable | "))?;
    let mut cells = row.split(" | ").map(|cell| cell.split(' ').next()?.parse().ok());
    Some([cells.next()??, cells.next()??, cells.next()??])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "wants documents that are not part of this repository: cargo xtask corpus DIR"]
async fn libvirts_documents() {
    let directory = std::env::var_os(DIRECTORY).expect("KARST_LIBVIRT_CORPUS names the directory");
    let all = count(Path::new(&directory)).await;
    assert!(all.iter().any(|c| c.usable), "no x86 documents with command lines beside them are there");
    let text = report(&all);
    // For who looks for what is next: each that is refused, with its first cause.
    for one in all.iter().filter(|c| c.usable) {
        if let Outcome::Refused(cause) = &one.outcome {
            println!("refused {}: {}", one.name, cause.text);
        }
    }
    println!("{text}");
    let old = before(&std::fs::read_to_string(RESULT).unwrap_or_default());
    std::fs::write(RESULT, &text).unwrap();
    let new = before(&text).expect("a report has its numbers");
    if let Some(old) = old.filter(|old| old[0] == new[0]) {
        assert!(new[1] >= old[1] && new[2] >= old[2], "of {} documents: was {old:?}, is {new:?}", new[0]);
    }
    let unnamed: Vec<_> = all
        .iter()
        .filter_map(|c| match &c.outcome {
            Outcome::Refused(cause) if !cause.named => Some(format!("{}: {}", c.name, cause.text)),
            _ => None,
        })
        .collect();
    assert!(unnamed.is_empty(), "refused without an element that is named:\n{}", unnamed.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_are_counted_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let domain = |name: &str, arch: &str, device: &str| {
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='{arch}' machine='q35'>hvm</type></os><devices>\
             <disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='p1' volume='w1'/>\
             <target dev='vda' bus='virtio'/></disk>{device}</devices></domain>"
        )
    };
    let nic = "<interface type='network'><source network='corpusbr0'/></interface>";
    for (name, text) in [
        ("good.xml", domain("good", "x86_64", nic)),
        ("good.x86_64-latest.args", String::new()),
        ("host.xml", domain("host", "x86_64", "<hostdev mode='subsystem' type='usb'/>")),
        ("host.args", String::new()),
        ("arm.xml", domain("arm", "aarch64", "")),
        ("broken.xml", "<domain><os><type arch='x86_64'>hvm</type></os></domian>".into()),
    ] {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    let all = count(directory.path()).await;
    let of =
        |name: &str| all.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("{name} is not counted"));
    assert_eq!(all.len(), 3);
    assert_eq!(of("good").outcome, Outcome::Accepted(None));
    let Outcome::Refused(cause) = &of("host").outcome else { panic!("a device of the host is accepted") };
    assert!(cause.named && cause.text.starts_with("hostdev: "), "{cause:?}");
    assert!(of("good").usable && of("host").usable && !of("broken").usable);
    assert!(matches!(of("broken").outcome, Outcome::Refused(_)));
    let text = report(&all);
    assert_eq!(before(&text), Some([2, 1, 1]), "{text}");
    assert_eq!(before("# nothing"), None);
}

#[test]
fn what_is_lost_is_found() {
    let domain = |clock: &str, device: &str| {
        let text = format!(
            "<domain type='qemu'><name>a</name><memory>65536</memory><os><type>hvm</type></os>{clock}<devices>\
             <disk type='volume'><source pool='p' volume='v'/><target dev='vda' bus='virtio'/></disk>{device}</devices></domain>"
        );
        read::machine(&text).unwrap()
    };
    let (local, sound) = ("<clock offset='localtime'/>", "<sound model='ich9'/>");
    let given = domain(local, sound);
    assert_eq!(difference(&given, &given), Ok(()));
    for kept in [domain("", sound), domain(local, "<sound model='ich6'/>")] {
        assert!(difference(&given, &kept).is_err());
    }
    let mut kept = given.clone();
    kept.memory += 1;
    assert_eq!(difference(&given, &kept), Err("memory: 65536 became 65537".into()));
    let mut kept = given.clone();
    kept.disks[0].source = Some(Source::Path("/dev/sda".into()));
    assert!(difference(&given, &kept).unwrap_err().starts_with("disks: "));
    // What the host gives is no difference.
    let mut kept = given.clone();
    kept.machine = Some("pc-i440fx-7.2".into());
    kept.disks[0].pci = Some("00:04.0".into());
    assert_eq!(difference(&given, &kept), Ok(()));
}
