//! What this host offers to virtual machines: accelerator, QEMU's version, default machine type.

use karst_host::Program;
use karst_model::{
    Error, Result,
    node::{Accelerator, AcceleratorKind},
};
use std::{
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Mutex,
    time::SystemTime,
};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostVirtualization {
    /// How virtual machines execute here, and why.
    pub accelerator: Accelerator,
    /// QEMU's version, such as `7.2.18`.
    pub qemu_version: String,
    /// Machine type for new virtual machines: what `q35` means to this QEMU, such as `pc-q35-7.2`.
    pub default_machine: String,
    /// It serves screens by SPICE.
    pub spice: bool,
}

/// `/dev/kvm` as far as it decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kvm {
    Missing,
    Refused,
    WrongVersion(i32),
    Answers,
}

/// KVM only when its device answers *and* the CPU has hardware virtualization: a device without it exists on hosts whose
/// own hypervisor offers none, and guests then hang in the firmware.
fn decide(kvm: Kvm, cpuinfo: &str, device: Option<(u32, u32)>) -> Accelerator {
    let flag = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .and_then(|l| l.split_ascii_whitespace().find(|f| matches!(*f, "vmx" | "svm")));
    let tcg = |reason: &str| Accelerator { kind: AcceleratorKind::Tcg, reason: reason.into() };
    match (kvm, flag) {
        (Kvm::Missing, None) => tcg(
            "the CPU has no hardware virtualization (neither vmx nor svm); virtual machines are emulated and slow. Turn \
             it on in the firmware, or allow nested virtualization when this host is itself a guest",
        ),
        (Kvm::Missing, Some(_)) => tcg(
            "/dev/kvm is missing although the CPU has hardware virtualization; load the module kvm_intel or kvm_amd. \
             Until then virtual machines are emulated and slow",
        ),
        (Kvm::Refused, _) => tcg("/dev/kvm cannot be opened; virtual machines are emulated and slow"),
        (Kvm::WrongVersion(v), _) => {
            tcg(&format!("/dev/kvm speaks version {v} and not 12; virtual machines are emulated and slow"))
        }
        (Kvm::Answers, None) => tcg(
            "/dev/kvm is there, but the CPU has no hardware virtualization (neither vmx nor svm); virtual machines are \
             emulated and slow",
        ),
        (Kvm::Answers, Some(f)) => match device {
            Some((mode, _)) if mode & 0o066 == 0 => tcg(
                "/dev/kvm is open to root alone and QEMU never runs as root; give it to the group kvm with mode 0660. \
                 Until then virtual machines are emulated and slow",
            ),
            _ => Accelerator {
                kind: AcceleratorKind::Kvm,
                reason: format!("/dev/kvm works and the CPU has {f}"),
            },
        },
    }
}

fn ask_kvm() -> Kvm {
    // _IO(0xAE, 0x00)
    const KVM_GET_API_VERSION: u32 = 0xae00;
    let file = match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Kvm::Missing,
        Err(_) => return Kvm::Refused,
    };
    // SAFETY: takes no argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION as _, 0) } {
        12 => Kvm::Answers,
        v => Kvm::WrongVersion(v),
    }
}

/// How virtual machines execute on this host. Cheap; asked anew each time, because modules come and go.
pub fn accelerator() -> Accelerator {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(ask_kvm(), &cpuinfo, device())
}

fn device() -> Option<(u32, u32)> {
    std::fs::metadata("/dev/kvm").ok().map(|m| (m.mode(), m.gid()))
}

/// The group that may open `/dev/kvm`, unless everybody may.
pub fn kvm_group() -> Option<u32> {
    device().filter(|(mode, _)| mode & 0o006 != 0o006).map(|(_, gid)| gid)
}

fn version(text: &str) -> Option<String> {
    let v = text.strip_prefix("QEMU emulator version ")?.split([' ', '(', '\n']).next()?;
    v.starts_with(|c: char| c.is_ascii_digit()).then(|| v.to_owned())
}

fn default_machine(text: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with("q35 "))?;
    let name = line.split_once("(alias of ")?.1.split(')').next()?;
    name.starts_with("pc-q35-").then(|| name.to_owned())
}

/// What QEMU has SPICE in: the server, the channels of viewers' agents and USB devices, and those devices.
const SPICE: [&str; 3] = ["ui-spice-core.so", "chardev-spice.so", "hw-usb-redirect.so"];

/// Does this host's QEMU serve screens by SPICE? Distributions give it modules for that, in a package that need not be there;
/// they are what is looked for. Cheap; asked anew each time, because packages come and go.
pub fn spice() -> bool {
    let Ok(program) = Program::QemuSystemX86.path() else { return false };
    // Its modules are those of where it is installed, not of another QEMU beside it.
    let program = std::fs::canonicalize(&program).unwrap_or(program);
    let prefix = program.parent().and_then(Path::parent);
    prefix.is_some_and(has_spice)
}

fn has_spice(prefix: &Path) -> bool {
    let places = ["lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"];
    places.iter().any(|place| SPICE.iter().all(|module| prefix.join(place).join(module).is_file()))
}

type Cached = Option<(PathBuf, SystemTime, String, String)>;
static CACHE: Mutex<Cached> = Mutex::new(None);

/// Asks host and QEMU; QEMU's answers are kept until its program changes.
///
/// # Errors
/// Unsupported when QEMU is not installed, naming the package.
pub async fn probe() -> Result<HostVirtualization> {
    let path = Program::QemuSystemX86.path()?;
    let modified = std::fs::metadata(&path)?.modified()?;
    let hit = CACHE.lock().ok().and_then(|c| c.clone()).filter(|(p, m, ..)| *p == path && *m == modified);
    let (qemu_version, default_machine) = match hit {
        Some((.., v, d)) => (v, d),
        None => {
            let ask = |argument: &'static [&'static str]| {
                karst_host::run(Program::QemuSystemX86).args(argument).ok()
            };
            let (v, m) = tokio::try_join!(ask(&["--version"]), ask(&["-machine", "help"]))?;
            let odd = |what: &str, text: &[u8]| {
                Error::internal(format!("QEMU does not tell its {what}"), String::from_utf8_lossy(text))
            };
            let v = version(&String::from_utf8_lossy(&v)).ok_or_else(|| odd("version", &v))?;
            let m = default_machine(&String::from_utf8_lossy(&m)).ok_or_else(|| odd("machine types", &m))?;
            if let Ok(mut c) = CACHE.lock() {
                *c = Some((path, modified, v.clone(), m.clone()));
            }
            (v, m)
        }
    };
    Ok(HostVirtualization { accelerator: accelerator(), qemu_version, default_machine, spice: spice() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_only_when_device_and_cpu_have_it() {
        let (with, without) = ("flags\t\t: fpu vmx sse\n", "flags\t\t: fpu avmx sse\n");
        let open = Some((0o020_660, 104));
        let kind = |k, c, d| decide(k, c, d).kind;
        assert_eq!(kind(Kvm::Answers, with, open), AcceleratorKind::Kvm);
        assert_eq!(kind(Kvm::Answers, without, open), AcceleratorKind::Tcg, "a dead device");
        assert_eq!(kind(Kvm::Answers, with, Some((0o020_600, 0))), AcceleratorKind::Tcg);
        for k in [Kvm::Missing, Kvm::Refused, Kvm::WrongVersion(11)] {
            let a = decide(k, with, open);
            assert!(a.kind == AcceleratorKind::Tcg && a.reason.contains("/dev/kvm"), "{a:?}");
        }
        assert!(decide(Kvm::Missing, without, None).reason.contains("firmware"));
    }

    #[test]
    fn understands_both_supported_versions() {
        for (text, v) in [
            ("QEMU emulator version 7.2.18 (Debian 1:7.2+dfsg-7+deb12u15)\nCopyright", "7.2.18"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n", "10.0.2"),
            ("QEMU emulator version 9.1.50\n", "9.1.50"),
        ] {
            assert_eq!(version(text).unwrap(), v);
        }
        let help = "Supported machines are:\npc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)\n\
            q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\npc-q35-7.2  x\n";
        assert_eq!(default_machine(help).unwrap(), "pc-q35-7.2");
        assert_eq!(default_machine("q35  (alias of evil)"), None);
    }

    #[test]
    fn spice_is_there_when_all_of_its_modules_are() {
        let prefix = tempfile::tempdir().unwrap();
        assert!(!has_spice(prefix.path()));
        let place = prefix.path().join("lib/x86_64-linux-gnu/qemu");
        std::fs::create_dir_all(&place).unwrap();
        for module in SPICE {
            assert!(!has_spice(prefix.path()), "without {module}");
            std::fs::write(place.join(module), "").unwrap();
        }
        assert!(has_spice(prefix.path()));
        std::fs::rename(&place, prefix.path().join("lib/elsewhere")).unwrap();
        assert!(!has_spice(prefix.path()));
    }

    #[tokio::test]
    async fn this_host() {
        if Program::QemuSystemX86.path().is_err() {
            return crate::backends::missing("QEMU is not installed");
        }
        let p = probe().await.unwrap();
        assert!(p.default_machine.starts_with("pc-q35-") && !p.accelerator.reason.is_empty(), "{p:?}");
        assert_eq!(probe().await.unwrap(), p, "the kept answer is the same");
    }
}
