//! QEMU's CPU model with its flags, out of what a domain says in `<cpu>`, `<features>` and `<clock>`, and back into a `<cpu>`.
//! All that is a flag of the processor to QEMU is one here, whichever element says it.

use super::{refuse, wrong};
use crate::{
    error::VirError,
    xml::{Element, machine::kept},
};

/// Models without the instructions of 64 bits.
const OF_32_BITS: &[&str] =
    &["486", "Conroe-32", "athlon", "coreduo", "kvm32", "n270", "pentium", "pentium2", "pentium3", "qemu32"];
/// What has flags without naming a model: as much as there is.
const MOST: &str = "max";
/// Kept of the flags: those that a document says by something else than `<feature>`.
const VENDOR: &str = "vendor";
const WIDTH: &str = "phys-bits";
const OWN_WIDTH: &str = "host-phys-bits";

fn word(s: &str) -> bool {
    !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The name of a vendor may have spaces in it.
fn vendor(s: &str) -> bool {
    !s.is_empty() && s.split(' ').all(|part| part.is_empty() || word(part)) && s.trim() == s
}

/// QEMU's model for a `<cpu>` with its flags; `None`: what the host has.
fn model(cpu: &Element) -> Result<Option<String>, VirError> {
    let mode = cpu.attribute("mode").unwrap_or("custom");
    let named = match mode {
        "host-passthrough" | "host-model" | "maximum" => None,
        "custom" => cpu.find("model").map(|m| m.body().trim()).filter(|m| !m.is_empty()),
        other => return Err(wrong(format!("Invalid mode attribute '{other}'"))),
    };
    if named.is_some_and(|m| !word(m)) {
        return Err(wrong(format!("'{}' is no CPU model", named.unwrap_or_default())));
    }
    let mut flags = String::new();
    if let Some(vendor) = cpu.find("model").and_then(|m| m.attribute("vendor_id")) {
        if !self::vendor(vendor) || vendor.len() != 12 {
            return Err(wrong("vendor_id must be exactly 12 characters, letters, digits and spaces"));
        }
        flags += &format!(",{VENDOR}={vendor}");
    }
    if cpu.attribute("migratable") == Some("off") {
        if mode == "custom" {
            return Err(refuse("cpu migratable", "is for the modes host-passthrough and maximum"));
        }
        flags += ",migratable=off";
    }
    for feature in cpu.all("feature") {
        let name = feature.attribute("name").unwrap_or_default();
        if !word(name) {
            return Err(wrong("Invalid CPU feature name"));
        }
        match feature.attribute("policy").unwrap_or("require") {
            "require" | "force" => flags += &format!(",{name}=on"),
            "disable" | "forbid" => flags += &format!(",{name}=off"),
            "optional" => {}
            other => return Err(wrong(format!("Invalid CPU feature policy '{other}'"))),
        }
    }
    if let Some(cache) = cpu.find("cache") {
        flags += match (cache.attribute("mode"), cache.attribute("level")) {
            (Some("emulate"), Some("3")) => ",l3-cache=on,host-cache-info=off",
            (Some("passthrough"), None) if mode != "custom" => ",l3-cache=off,host-cache-info=on",
            (Some("disable"), None) => ",l3-cache=off,host-cache-info=off",
            _ => {
                let text = "level 3 is emulated, all are passed through to a processor of mode host-passthrough or maximum, or disabled";
                return Err(refuse("cpu cache", text));
            }
        };
    }
    if let Some(width) = cpu.find("maxphysaddr") {
        match (width.attribute("mode"), width.attribute("bits"), width.attribute("limit")) {
            (Some("passthrough"), None, None) => flags += &format!(",{OWN_WIDTH}=on"),
            (Some("emulate"), Some(bits), None)
                if bits.parse::<u8>().is_ok_and(|n| (32..=52).contains(&n)) =>
            {
                flags += &format!(",{WIDTH}={bits},{OWN_WIDTH}=off");
            }
            _ => return Err(refuse("cpu maxphysaddr", "is passthrough, or emulate with 32 to 52 bits")),
        }
    }
    Ok(match (named, flags.is_empty()) {
        (Some(model), _) => Some(format!("{model}{flags}")),
        (None, true) => None,
        (None, false) => Some(format!("{MOST}{flags}")),
    })
}

/// What `<features>` say of the processor.
fn of_features(features: &Element) -> Result<String, VirError> {
    let mut flags = String::new();
    let mut switch = |flag: &str, state: Option<&str>| match state {
        Some("on" | "yes") => flags += &format!(",{flag}=on"),
        Some("off" | "no") => flags += &format!(",{flag}=off"),
        _ => {}
    };
    for e in features.elements() {
        let state = e.attribute("state");
        match e.name() {
            "apic" => switch("kvm-pv-eoi", e.attribute("eoi")),
            "pvspinlock" => switch("kvm-pv-unhalt", state.or(Some("on"))),
            "pmu" => switch("pmu", state.or(Some("on"))),
            "kvm" => {
                for inner in e.elements() {
                    let on = inner.attribute("state") == Some("on");
                    match (inner.name(), on) {
                        ("hidden", true) => switch("kvm", Some("off")),
                        ("hint-dedicated", true) => switch("kvm-hint-dedicated", Some("on")),
                        ("poll-control", true) => switch("kvm-poll-control", Some("on")),
                        ("pv-ipi", false) => switch("kvm-pv-ipi", Some("off")),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    match features.find("hyperv").filter(|h| !kept::usual_hyper_v(h)) {
        Some(hyper_v) => Ok(flags + &of_hyper_v(hyper_v)?),
        None => Ok(flags),
    }
}

/// What Hyper-V tells its guests, one by one.
fn of_hyper_v(e: &Element) -> Result<String, VirError> {
    if e.attribute("mode") == Some("passthrough") {
        return Ok(",hv-passthrough=on".into());
    }
    let mut flags = String::new();
    for one in e.elements().iter().filter(|one| one.attribute("state") == Some("on")) {
        let name = one.name();
        flags += &match name {
            "vendor_id" => {
                let value = one.attribute("value").unwrap_or_default();
                if !vendor(value) || value.len() > 12 {
                    return Err(refuse(
                        "features hyperv vendor_id",
                        "has at most 12 characters, letters, digits and spaces",
                    ));
                }
                format!(",hv-vendor-id={value}")
            }
            "spinlocks" => {
                let retries: u32 = one
                    .attribute("retries")
                    .and_then(|r| r.parse().ok())
                    .filter(|r| *r >= 4095)
                    .ok_or_else(|| wrong("HyperV spinlock retry count must be at least 4095"))?;
                format!(",hv-spinlocks={retries:#x}")
            }
            "stimer" if one.find("direct").is_some_and(|d| d.attribute("state") == Some("on")) => {
                ",hv-stimer=on,hv-stimer-direct=on".to_owned()
            }
            "relaxed" | "vapic" | "vpindex" | "runtime" | "synic" | "stimer" | "reset" | "frequencies"
            | "reenlightenment" | "tlbflush" | "ipi" | "evmcs" | "avic" => format!(",hv-{name}=on"),
            _ => return Err(refuse("features hyperv", format!("'{name}' is not there"))),
        };
    }
    Ok(flags)
}

/// What the timers of a `<clock>` are of the processor.
fn of_clock(clock: &Element) -> String {
    let mut flags = String::new();
    for timer in clock.all("timer") {
        let present = timer.attribute("present");
        match (timer.attribute("name"), present, timer.attribute("frequency")) {
            (Some("kvmclock"), Some("no"), _) => flags += ",kvmclock=off",
            (Some("tsc"), _, Some(hertz)) if hertz.bytes().all(|b| b.is_ascii_digit()) => {
                flags += &format!(",tsc-frequency={hertz}");
            }
            _ => {}
        }
    }
    flags
}

/// Has it no instructions of 64 bits?
pub fn is_of_32_bits(model: &str) -> bool {
    let mut words = model.split(',');
    OF_32_BITS.contains(&words.next().unwrap_or_default()) || words.any(|w| w == "lm=off")
}

/// The processor that a domain asks for; `None`: what the host has. `old`: one of 32 bits (`i686`).
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(
    cpu: Option<&Element>,
    features: Option<&Element>,
    clock: Option<&Element>,
    old: bool,
) -> Result<Option<String>, VirError> {
    let mut found = cpu.map(model).transpose()?.flatten();
    let mut more = features.map(of_features).transpose()?.unwrap_or_default();
    more += &clock.map(of_clock).unwrap_or_default();
    // What was shown of it says the same once more; what only another element can say comes last.
    let mut more: Vec<&str> = more.split(',').filter(|flag| !flag.is_empty()).collect();
    more.sort_by_key(|flag| !flag.ends_with("=on") && !flag.ends_with("=off"));
    let more: String = more
        .into_iter()
        .filter(|flag| !found.as_deref().unwrap_or_default().split(',').any(|known| known == *flag))
        .map(|flag| format!(",{flag}"))
        .collect();
    if old && found.is_none() {
        found = Some("qemu32".into());
    }
    if !more.is_empty() {
        found = Some(found.unwrap_or_else(|| MOST.into()) + &more);
    }
    Ok(match found {
        Some(model) if old && !is_of_32_bits(&model) => Some(model + ",lm=off"),
        found => found,
    })
}

/// The `<cpu>` of a machine with this processor.
pub fn shown(model: &str) -> Element {
    let cpu = Element::new("cpu");
    let mut words = model.split(',');
    let name = words.next().unwrap_or_default();
    let flags: Vec<&str> = words.collect();
    let value = |of: &str| flags.iter().find_map(|f| f.strip_prefix(of)?.strip_prefix('='));
    let migratable = value("migratable").unwrap_or("on");
    let mut cpu = match name {
        "host" => cpu.with("mode", "host-passthrough").with("check", "none").with("migratable", migratable),
        "max" => cpu.with("mode", "maximum").with("check", "none").with("migratable", migratable),
        _ => cpu.with("mode", "custom").with("match", "exact").with("check", "none"),
    };
    let vendor = value(VENDOR);
    if !matches!(name, "host" | "max") {
        cpu.push(Element::text("model", name).with("fallback", "forbid").with_some("vendor_id", vendor));
    } else if vendor.is_some() {
        cpu.push(Element::new("model").with("fallback", "forbid").with_some("vendor_id", vendor));
    }
    let apart = [OWN_WIDTH, "migratable"];
    for flag in &flags {
        let (name, policy) = match flag.split_once('=') {
            Some((name, _)) if apart.contains(&name) => continue,
            Some((name, "off")) => (name, "disable"),
            Some((name, "on")) => (name, "require"),
            // Said by elements of their own.
            Some(_) => continue,
            None => (flag.trim_start_matches('+'), "require"),
        };
        cpu.push(Element::new("feature").with("policy", policy).with("name", name));
    }
    match (value(WIDTH), value(OWN_WIDTH)) {
        (Some(bits), _) => cpu.push(Element::new("maxphysaddr").with("mode", "emulate").with("bits", bits)),
        (None, Some("on")) => cpu.push(Element::new("maxphysaddr").with("mode", "passthrough")),
        _ => {}
    }
    cpu
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn of(text: &str, old: bool) -> Result<Option<String>, VirError> {
        let root = document(&format!("<domain>{text}</domain>")).unwrap();
        read(root.find("cpu"), root.find("features"), root.find("clock"), old)
    }

    #[test]
    fn what_is_a_flag_of_the_processor() {
        for (text, old, model) in [
            ("", false, None),
            ("", true, Some("qemu32")),
            ("<cpu mode='host-passthrough'/>", false, None),
            (
                "<cpu mode='host-passthrough'><feature name='vmx' policy='disable'/></cpu>",
                false,
                Some("max,vmx=off"),
            ),
            ("<cpu mode='maximum' migratable='off'/>", false, Some("max,migratable=off")),
            ("<cpu><model>core2duo</model></cpu>", true, Some("core2duo,lm=off")),
            ("<cpu><model>pentium3</model></cpu>", true, Some("pentium3")),
            (
                "<cpu><model vendor_id='KVMKVMKVMKVM'>qemu64</model></cpu>",
                false,
                Some("qemu64,vendor=KVMKVMKVMKVM"),
            ),
            (
                "<cpu mode='host-passthrough'><cache mode='passthrough'/></cpu>",
                false,
                Some("max,l3-cache=off,host-cache-info=on"),
            ),
            (
                "<cpu mode='host-passthrough'><maxphysaddr mode='emulate' bits='42'/></cpu>",
                false,
                Some("max,phys-bits=42,host-phys-bits=off"),
            ),
            (
                "<features><apic eoi='off'/><pvspinlock/><pmu state='off'/></features>",
                false,
                Some("max,kvm-pv-eoi=off,kvm-pv-unhalt=on,pmu=off"),
            ),
            ("<features><kvm><hidden state='on'/></kvm></features>", false, Some("max,kvm=off")),
            ("<clock><timer name='kvmclock' present='no'/></clock>", true, Some("qemu32,kvmclock=off")),
            (
                "<clock><timer name='tsc' frequency='3504000000'/></clock>",
                false,
                Some("max,tsc-frequency=3504000000"),
            ),
            (
                "<features><hyperv><vendor_id state='on' value='KVM'/><spinlocks state='on' retries='12287'/></hyperv></features>",
                false,
                Some("max,hv-vendor-id=KVM,hv-spinlocks=0x2fff"),
            ),
            ("<features><hyperv mode='passthrough'/></features>", false, Some("max,hv-passthrough=on")),
            // All together they are a key of the machine's.
            ("<features><hyperv><relaxed state='on'/></hyperv></features>", false, None),
        ] {
            assert_eq!(of(text, old).unwrap().as_deref(), model, "{text}");
        }
    }

    #[test]
    fn what_is_shown_says_the_same() {
        for model in [
            "qemu32",
            "max",
            "host",
            "EPYC,aes=off,avx=on",
            "max,vendor=KVMKVMKVMKVM,kvm=off,phys-bits=42,host-phys-bits=off",
            "qemu64,host-phys-bits=on",
            "core2duo,lm=off",
            "max,migratable=off",
            "max,l3-cache=off,host-cache-info=off",
        ] {
            let again = super::model(&shown(model)).unwrap();
            assert_eq!(again.unwrap_or_else(|| if model == "host" { "host" } else { "max" }.into()), model);
        }
    }

    #[test]
    fn what_cannot_be_names_its_element() {
        for (text, element) in [
            ("<cpu><model>core2duo</model><cache mode='passthrough'/></cpu>", "cpu cache: "),
            ("<cpu mode='maximum'><cache mode='emulate' level='2'/></cpu>", "cpu cache: "),
            ("<cpu mode='maximum'><maxphysaddr mode='emulate'/></cpu>", "cpu maxphysaddr: "),
            ("<cpu migratable='off'><model>qemu64</model></cpu>", "cpu migratable: "),
            ("<features><hyperv><telepathy state='on'/></hyperv></features>", "features hyperv: "),
        ] {
            let e = of(text, false).unwrap_err();
            assert!(e.text.starts_with(element), "{text}: {}", e.text);
        }
    }
}
