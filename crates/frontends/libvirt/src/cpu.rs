//! Processors as sets of features: does a host have what a document asks for, and what have several in common?
//!
//! What the host has is what its kernel lists, or what its QEMU gives to guests; what a model has is what that QEMU says of
//! it. Features are called as libvirt calls them. Pure: text and lists in, answers out.

use crate::{
    error::{Code, Part, VirError},
    xml::Element,
};
use karst_engine::health::resources::{CpuModel, HostResources};
use std::{
    collections::{BTreeSet, HashMap},
    sync::LazyLock,
};

/// Features that a document may name.
const FEATURES: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 pn clflush ds acpi mmx fxsr \
    sse sse2 ss ht tm ia64 pbe pni pclmuldq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid fma cx16 xtpr pdcm pcid dca \
    sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c rdrand hypervisor arat fsgsbase tsc_adjust \
    sgx bmi1 hle avx2 smep bmi2 erms invpcid rtm cmt mpx avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt \
    clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl avx512vbmi umip pku ospke waitpkg avx512vbmi2 gfni \
    vaes vpclmulqdq avx512vnni avx512bitalg avx512-vpopcntdq la57 rdpid bus-lock-detect cldemote movdiri movdir64b sgxlc \
    pks avx512-4vnniw avx512-4fmaps fsrm avx512-vp2intersect md-clear serialize tsx-ldtrk pconfig arch-lbr amx-bf16 \
    avx512-fp16 amx-tile amx-int8 spec-ctrl stibp arch-capabilities core-capability ssbd avx-vnni avx512-bf16 xsaveopt \
    xsavec xgetbv1 xsaves xfd mbm_total mbm_local syscall nx mmxext fxsr_opt pdpe1gb rdtscp lm 3dnowext 3dnow lahf_lm \
    cmp_legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt lwp fma4 tce cvt16 \
    nodeid_msr tbm topoext perfctr_core perfctr_nb invtsc clzero xsaveerptr wbnoinvd ibpb ibrs amd-stibp amd-ssbd \
    virt-ssbd amd-no-ssb npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists pause-filter \
    pfthreshold avic v-vmsave-vmload vgif svme-addr-chk rdctl-no ibrs-all rsba skip-l1dfl-vmentry ssb-no mds-no \
    pschange-mc-no tsx-ctrl taa-no split-lock-detect";

/// Of these, what a kernel does not list although the processor may have it: a model's are taken as given.
const SILENT: [&str; 15] = [
    "osxsave",
    "ospke",
    "core-capability",
    "split-lock-detect",
    "amd-no-ssb",
    "rdctl-no",
    "ibrs-all",
    "rsba",
    "skip-l1dfl-vmentry",
    "ssb-no",
    "mds-no",
    "pschange-mc-no",
    "tsx-ctrl",
    "taa-no",
    "svme-addr-chk",
];

/// What a guest that moves cannot keep.
const STAYS: [&str; 2] = ["xsaves", "invtsc"];

/// Models of QEMU that stand for no vendor's, whatever their guests read.
const OF_NOBODY: [&str; 8] = ["qemu64", "qemu32", "kvm64", "kvm32", "486", "pentium", "pentium2", "pentium3"];

/// Other names, of QEMU and of the kernel, as [`plain`] has them.
const ALIASES: [(&str, &str); 11] = [
    ("sse3", "pni"),
    ("pclmulqdq", "pclmuldq"),
    ("tscdeadlinetimer", "tsc-deadline"),
    ("xd", "nx"),
    ("i64", "lm"),
    ("ffxsr", "fxsr_opt"),
    ("cqm", "cmt"),
    ("cqmmbmtotal", "mbm_total"),
    ("cqmmbmlocal", "mbm_local"),
    ("dts", "ds"),
    ("nonstoptsc", "invtsc"),
];

/// A name without what separates its words: QEMU, the kernel and libvirt differ in nothing more often.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_' | '.')).collect()
}

/// The feature of a name or of another name of it.
fn feature(name: &str) -> Option<&'static str> {
    static KNOWN: LazyLock<HashMap<String, &'static str>> = LazyLock::new(|| {
        let own = FEATURES.split_ascii_whitespace().map(|f| (plain(f), f));
        own.chain(ALIASES.iter().map(|(alias, f)| ((*alias).to_owned(), *f))).collect()
    });
    KNOWN.get(&plain(name)).copied()
}

/// libvirt's name of a vendor that processors name themselves by.
fn vendor(string: &str) -> Option<&'static str> {
    match string {
        "GenuineIntel" => Some("Intel"),
        "AuthenticAMD" => Some("AMD"),
        "HygonGenuine" => Some("Hygon"),
        _ => None,
    }
}

/// Features.
pub type Features = BTreeSet<&'static str>;

fn features<'a>(names: impl IntoIterator<Item = &'a String>) -> Features {
    names.into_iter().filter_map(|n| feature(n)).collect()
}

/// A model of the host's QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Name.
    pub name: String,
    /// libvirt's name of its vendor.
    pub vendor: Option<&'static str>,
    features: Features,
    /// What the host's accelerator cannot give of it, in libvirt's words as far as it has some.
    pub missing: Vec<String>,
}

impl Model {
    fn of(model: &CpuModel) -> Self {
        let vendor = vendor(&model.vendor).filter(|_| !OF_NOBODY.contains(&model.name.as_str()));
        let word = |name: &String| feature(name).map_or_else(|| name.clone(), str::to_owned);
        let missing: BTreeSet<String> = model.missing.iter().map(word).collect();
        Self {
            name: model.name.clone(),
            vendor,
            features: features(&model.features),
            missing: missing.into_iter().collect(),
        }
    }
}

/// All that can be named, and what comparisons are made with.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    /// Models that documents may name, those with most features first.
    pub models: Vec<Model>,
    /// What guests get at most.
    most: Option<Model>,
}

impl Catalogue {
    /// Out of what QEMU says.
    pub fn new(all: &[CpuModel]) -> Self {
        let most = ["host", "max"].iter().find_map(|n| all.iter().find(|m| m.name == *n)).map(Model::of);
        let named = all.iter().filter(|m| !matches!(m.name.as_str(), "host" | "max" | "base"));
        let mut models: Vec<Model> = named.map(Model::of).collect();
        // Every guest sees that it is one: that is no property of a model.
        for model in &mut models {
            model.features.remove("hypervisor");
        }
        models.sort_by(|a, b| b.features.len().cmp(&a.features.len()).then_with(|| a.name.cmp(&b.name)));
        Self { models, most }
    }

    fn find(&self, name: &str) -> Result<&Model, VirError> {
        let found = self.models.iter().find(|m| m.name == name);
        found.ok_or_else(|| odd(format!("Unknown CPU model {name}")))
    }

    /// What guests of this host's QEMU get at most.
    ///
    /// # Errors
    /// Unsupported when QEMU does not tell.
    pub fn hypervisor(&self) -> Result<Host, VirError> {
        let most = self.most.as_ref().ok_or_else(|| {
            VirError::new(Code::OperationUnsupported, Part::Cpu, "QEMU does not tell what its guests get")
        })?;
        Ok(Host { vendor: most.vendor, features: most.features.clone(), silent: &[] })
    }
}

/// A processor that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    vendor: Option<&'static str>,
    features: Features,
    /// Features of which it is not known whether it has them.
    silent: &'static [&'static str],
}

impl Host {
    /// What the kernel of a host lists; nothing when it lists nothing.
    pub fn of(resources: &HostResources) -> Option<Self> {
        let socket = resources.sockets.first()?;
        let vendor = vendor(&socket.vendor);
        let flags = socket.cores.iter().map(|c| &c.flags).find(|f| !f.is_empty())?;
        let mut features =
            features(flags.iter().filter(|f| !matches!(f.as_str(), "ibrs" | "stibp" | "ssbd")));
        // One flag of the kernel for what vendors have in different places.
        let has = |flag: &str| flags.iter().any(|f| f == flag);
        let amd = vendor != Some("Intel");
        let shared = [
            ("ibrs", "spec-ctrl", "ibrs"),
            ("stibp", "stibp", "amd-stibp"),
            ("ssbd", "ssbd", if has("virt_ssbd") { "virt-ssbd" } else { "amd-ssbd" }),
        ];
        features.extend(shared.iter().filter(|s| has(s.0)).map(|s| if amd { s.2 } else { s.1 }));
        Some(Self { vendor, features, silent: &SILENT })
    }

    /// It as elements of the capabilities: model, vendor, and the features beyond the model.
    pub fn described(&self, catalogue: &Catalogue) -> Option<(Element, Option<Element>, Vec<Element>)> {
        let mut best: Option<(usize, &Model)> = None;
        for model in catalogue.models.iter().filter(|m| m.vendor.is_none() || m.vendor == self.vendor) {
            if model.features.iter().any(|f| !self.features.contains(f) && !self.silent.contains(f)) {
                continue;
            }
            let more = self.features.difference(&model.features).count();
            if best.is_none_or(|(least, _)| more < least) {
                best = Some((more, model));
            }
        }
        let (_, model) = best?;
        let beyond = self.features.difference(&model.features);
        let beyond = beyond.map(|f| Element::new("feature").with("name", f)).collect();
        Some((Element::text("model", &model.name), self.vendor.map(|v| Element::text("vendor", v)), beyond))
    }
}

/// What a document wants of a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Force,
    Require,
    Optional,
    Disable,
    Forbid,
}

/// A processor as a document describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// Of a host, so that nothing is said of policies.
    host: bool,
    arch: Option<String>,
    model: Option<String>,
    vendor: Option<String>,
    strict: bool,
    features: Vec<(&'static str, Policy)>,
}

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Cpu, text)
}

fn unsupported(text: impl Into<String>) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Cpu, text)
}

fn odd(text: impl Into<String>) -> VirError {
    VirError::new(Code::InternalError, Part::Cpu, text)
}

/// Reads the document of a processor: `<cpu>`.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED; internal, as libvirt has it, for models and features that nothing knows.
pub fn read(text: &str, catalogue: &Catalogue) -> Result<Cpu, VirError> {
    let root = crate::xml::read::document(text)?;
    if root.name() != "cpu" {
        return Err(wrong("XML does not contain expected 'cpu' element"));
    }
    let body = |name: &str| root.find(name).map(|e| e.body().trim().to_owned()).filter(|t| !t.is_empty());
    let host = root.find("arch").is_some();
    if host && root.attribute("match").is_some() {
        return Err(wrong("'arch' element cannot be used inside 'cpu' element with 'match' attribute'"));
    }
    let mode = root.attribute("mode");
    if host && mode.is_some() {
        return Err(unsupported("Attribute mode is only allowed for guest CPU"));
    }
    if let Some(mode) = mode
        && !matches!(mode, "custom" | "host-model" | "host-passthrough" | "maximum")
    {
        return Err(unsupported(format!("Invalid mode attribute '{mode}'")));
    }
    let strict = match root.attribute("match").unwrap_or("exact") {
        "exact" | "minimum" => false,
        "strict" => true,
        other => {
            return Err(wrong(format!("Invalid value for attribute 'match' in element 'cpu': '{other}'.")));
        }
    };
    let (model, vendor) = (body("model"), body("vendor"));
    if host && model.is_none() {
        return Err(wrong("Missing CPU model name"));
    }
    if vendor.is_some() && model.is_none() {
        return Err(wrong("CPU vendor specified without CPU model"));
    }
    if model.is_none() && root.find("feature").is_some() && mode.unwrap_or("custom") == "custom" {
        return Err(wrong("Non-empty feature list specified without CPU model"));
    }
    if let Some(model) = &model {
        catalogue.find(model)?;
    }
    let mut features: Vec<(&'static str, Policy)> = vec![];
    for e in root.all("feature") {
        let policy = match e.attribute("policy").filter(|_| !host).unwrap_or("require") {
            "force" => Policy::Force,
            "require" => Policy::Require,
            "optional" => Policy::Optional,
            "disable" => Policy::Disable,
            "forbid" => Policy::Forbid,
            _ => return Err(unsupported("Invalid CPU feature policy")),
        };
        let name = e.attribute("name").unwrap_or_default();
        if name.is_empty() {
            return Err(wrong("Invalid CPU feature name"));
        }
        let known = feature(name).ok_or_else(|| odd(format!("Unknown CPU feature {name}")))?;
        if features.iter().any(|(f, _)| *f == known) {
            return Err(wrong(format!("CPU feature '{name}' specified more than once")));
        }
        features.push((known, policy));
    }
    Ok(Cpu { host, arch: body("arch"), model, vendor, strict, features })
}

impl Cpu {
    fn with(&self, policy: Policy) -> Features {
        self.features.iter().filter(|(_, p)| *p == policy).map(|(f, _)| *f).collect()
    }

    /// All that it has: of its model, and what it adds and takes away.
    fn all(&self, catalogue: &Catalogue) -> Result<Features, VirError> {
        let mut all = match &self.model {
            Some(model) => catalogue.find(model)?.features.clone(),
            None => Features::new(),
        };
        for (feature, policy) in &self.features {
            match policy {
                Policy::Force | Policy::Require => drop(all.insert(feature)),
                Policy::Disable | Policy::Forbid => drop(all.remove(feature)),
                Policy::Optional => {}
            }
        }
        Ok(all)
    }
}

/// How a host relates to a described processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    /// It cannot be had there, and why.
    Incompatible(String),
    /// It is the same.
    Identical,
    /// The host has more.
    Superset,
}

fn joined<'a>(features: impl IntoIterator<Item = &'a &'static str>) -> String {
    features.into_iter().copied().collect::<Vec<_>>().join(", ")
}

/// Compares.
///
/// # Errors
/// Internal, for a model that nothing knows.
pub fn compare(host: &Host, cpu: &Cpu, catalogue: &Catalogue) -> Result<Comparison, VirError> {
    let no = |text: String| Ok(Comparison::Incompatible(text));
    if let Some(arch) = cpu.arch.as_ref().filter(|a| !matches!(a.as_str(), "x86_64" | "i686")) {
        return no(format!("CPU arch {arch} does not match host arch"));
    }
    if let Some(vendor) = cpu.vendor.as_ref().filter(|v| Some(v.as_str()) != host.vendor) {
        return no(format!("host CPU vendor does not match required CPU vendor {vendor}"));
    }
    let forbidden: Features = cpu.with(Policy::Forbid).intersection(&host.features).copied().collect();
    if !forbidden.is_empty() {
        return no(format!("Host CPU provides forbidden features: {}", joined(&forbidden)));
    }
    let explicit = cpu.with(Policy::Require);
    let (force, optional, disable) =
        (cpu.with(Policy::Force), cpu.with(Policy::Optional), cpu.with(Policy::Disable));
    let mut required = match &cpu.model {
        Some(model) => catalogue.find(model)?.features.clone(),
        None => Features::new(),
    };
    required.retain(|f| !host.silent.contains(f));
    required.extend(&explicit);
    required.retain(|f| !force.contains(f) && !optional.contains(f) && !disable.contains(f));
    let missing: Features = required.difference(&host.features).copied().collect();
    if !missing.is_empty() {
        return no(format!("Host CPU does not provide required features: {}", joined(&missing)));
    }
    let said = |f: &&'static str| {
        required.contains(f) || optional.contains(f) || disable.contains(f) || force.contains(f)
    };
    let extra: Features = host.features.iter().filter(|f| !said(f)).copied().collect();
    match (extra.is_empty(), cpu.strict && !cpu.host) {
        (true, _) => Ok(Comparison::Identical),
        (false, false) => Ok(Comparison::Superset),
        (false, true) => {
            no(format!("Host CPU does not strictly match guest CPU: Extra features: {}", joined(&extra)))
        }
    }
}

/// What a guest's document must switch off of a model counts more than what it adds, and each one more.
fn weight(more: usize, less: usize) -> (usize, usize) {
    let penalty = (2..2 + less).sum();
    (more + penalty, penalty)
}

/// The processor that all of several have, as a document. With `limit`, what guests get at most.
///
/// # Errors
/// Invalid, operation failed when they have nothing in common or are of several vendors.
pub fn baseline(
    cpus: &[Cpu],
    catalogue: &Catalogue,
    limit: Option<&Host>,
    expand: bool,
    migratable: bool,
) -> Result<String, VirError> {
    let failed = |text: String| Err(VirError::new(Code::OperationFailed, Part::Cpu, text));
    if cpus.is_empty() {
        return Err(VirError::argument("ncpus in virConnectBaselineCPU must not be zero"));
    }
    let mut common: Option<Features> = None;
    let mut vendor: Option<&'static str> = None;
    let mut named = vec![];
    for (at, cpu) in cpus.iter().enumerate() {
        let Some(name) = &cpu.model else {
            return Err(VirError::argument(format!("no CPU model specified at index {at}")));
        };
        if let Some(arch) = cpu.arch.as_ref().filter(|a| *a != "x86_64") {
            return failed(format!("CPU arch {arch} of index {at} is not that of the host"));
        }
        let model = catalogue.find(name)?;
        if !named.contains(&name) {
            named.push(name);
        }
        let said = match &cpu.vendor {
            Some(v) => match ["Intel", "AMD", "Hygon"].iter().find(|known| *known == v) {
                Some(known) => Some(*known),
                None => return failed(format!("Unknown CPU vendor {v}")),
            },
            None => None,
        };
        if let (Some(said), Some(of)) = (said, model.vendor)
            && said != of
        {
            return failed(format!("CPU vendor {of} of model {name} differs from vendor {said}"));
        }
        match (vendor, said.or(model.vendor)) {
            (Some(one), Some(other)) if one != other => return failed("CPU vendors do not match".into()),
            (None, some) => vendor = some,
            _ => {}
        }
        let all = cpu.all(catalogue)?;
        common = Some(match common {
            None => all,
            Some(before) => before.intersection(&all).copied().collect(),
        });
    }
    let mut common = common.unwrap_or_default();
    if let Some(limit) = limit {
        common.retain(|f| limit.features.contains(f));
    }
    if common.is_empty() {
        return failed("CPUs are incompatible".into());
    }
    let mut best: Option<((usize, usize), &Model)> = None;
    for model in
        catalogue.models.iter().filter(|m| m.vendor.is_none() || vendor.is_none() || m.vendor == vendor)
    {
        let more = common.difference(&model.features).count();
        let now = weight(more, model.features.difference(&common).count());
        // The one model that all of them are of.
        if named.len() == 1 && *named[0] == model.name {
            best = Some((now, model));
            break;
        }
        if best.is_none_or(|(least, _)| now < least) {
            best = Some((now, model));
        }
    }
    let Some((_, model)) = best else {
        return Err(odd("Cannot find suitable CPU model for given data"));
    };
    let stays = |f: &&&'static str| !(migratable && STAYS.contains(*f));
    let fallback = if named.len() == 1 && *named[0] == model.name { "forbid" } else { "allow" };
    let mut e = Element::new("cpu").with("mode", "custom").with("match", "exact");
    e.push(Element::text("model", &model.name).with("fallback", fallback));
    if cpus.iter().all(|c| c.vendor.is_some()) {
        e.push_some(vendor.map(|v| Element::text("vendor", v)));
    }
    let one = |policy: &str, f: &&'static str| Element::new("feature").with("policy", policy).with("name", f);
    let shown: Vec<_> = if expand {
        common.iter().filter(stays).map(|f| one("require", f)).collect()
    } else {
        common.difference(&model.features).filter(stays).map(|f| one("require", f)).collect()
    };
    let without = model.features.difference(&common).map(|f| one("disable", f));
    Ok(e.children(shown).children(without).document())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_engine::health::resources::{CpuCore, CpuSocket};

    fn model(name: &str, vendor: &str, features: &str) -> CpuModel {
        CpuModel {
            name: name.into(),
            vendor: vendor.into(),
            features: features.split(' ').map(str::to_owned).collect(),
            missing: vec![],
        }
    }

    fn catalogue() -> Catalogue {
        Catalogue::new(&[
            model("Small", "GenuineIntel", "sse2 hypervisor"),
            model("Large", "GenuineIntel", "sse2 sse4-1 sse4.1 aes rdctl-no hypervisor"),
            model("Other", "AuthenticAMD", "sse2 sse4a"),
            model("max", "GenuineIntel", "sse2 sse4.1 hypervisor"),
        ])
    }

    fn host(flags: &str) -> Host {
        let flags = flags.split(' ').map(str::to_owned).collect();
        let cores = vec![CpuCore { flags, ..Default::default() }];
        let socket = CpuSocket { vendor: "GenuineIntel".into(), cores, ..Default::default() };
        Host::of(&HostResources { sockets: vec![socket], ..Default::default() }).unwrap()
    }

    fn compared(flags: &str, inner: &str) -> Comparison {
        let cpu = read(&format!("<cpu>{inner}</cpu>"), &catalogue()).unwrap();
        compare(&host(flags), &cpu, &catalogue()).unwrap()
    }

    #[test]
    fn names_of_the_kernel_and_of_qemu_are_libvirts() {
        for (said, meant) in [
            ("sse4_1", "sse4.1"),
            ("pclmulqdq", "pclmuldq"),
            ("tsc_deadline_timer", "tsc-deadline"),
            ("avx512_vnni", "avx512vnni"),
            ("lahf-lm", "lahf_lm"),
            ("nonstop_tsc", "invtsc"),
            ("xd", "nx"),
        ] {
            assert_eq!(feature(said), Some(meant), "{said}");
        }
        assert_eq!(feature("realized"), None);
        assert!(host("sse2 ibrs").features.contains("spec-ctrl"));
        let all: Vec<_> = FEATURES.split_ascii_whitespace().map(plain).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "no two are one");
        assert!(SILENT.iter().all(|f| feature(f) == Some(f)));
    }

    #[test]
    fn hosts_are_compared() {
        use Comparison::{Identical, Superset};
        assert_eq!(compared("sse2", "<model>Small</model>"), Identical);
        assert_eq!(compared("sse2 aes", "<model>Small</model>"), Superset);
        // Of what its kernel does not list, nothing is demanded.
        assert_eq!(compared("sse2 sse4_1 aes", "<model>Large</model>"), Identical);
        let disabled = "<model>Large</model><feature name='aes' policy='disable'/>";
        assert_eq!(compared("sse2 sse4_1", disabled), Identical);
        for (flags, inner, word) in [
            ("sse2", "<model>Large</model>", "required features: aes, sse4.1"),
            (
                "sse2 aes",
                "<model>Small</model><feature name='aes' policy='forbid'/>",
                "forbidden features: aes",
            ),
            ("sse2", "<model>Small</model><vendor>AMD</vendor>", "vendor AMD"),
            ("sse2", "<arch>aarch64</arch><model>Small</model>", "arch aarch64"),
        ] {
            let Comparison::Incompatible(why) = compared(flags, inner) else {
                panic!("{inner} is compatible")
            };
            assert!(why.contains(word), "{why}");
        }
        let strict = read("<cpu match='strict'><model>Small</model></cpu>", &catalogue()).unwrap();
        let extra = compare(&host("sse2 aes"), &strict, &catalogue()).unwrap();
        assert!(matches!(extra, Comparison::Incompatible(why) if why.contains("Extra features: aes")));
    }

    #[test]
    fn what_a_host_is_described_as_is_the_same() {
        let host = host("sse2 sse4_1 aes ibrs popcnt");
        let (model, vendor, beyond) = host.described(&catalogue()).unwrap();
        assert_eq!((model.body(), vendor.as_ref().unwrap().body()), ("Large", "Intel"));
        let e =
            Element::new("cpu").child(Element::text("arch", "x86_64")).child(model).child(vendor.unwrap());
        let text = e.children(beyond).document();
        let cpu = read(&text, &catalogue()).unwrap();
        assert_eq!(compare(&host, &cpu, &catalogue()).unwrap(), Comparison::Identical);
    }

    #[test]
    fn wrong_documents_are_refused() {
        for (text, code, word) in [
            ("<cpu", Code::XmlError, ""),
            ("<domain/>", Code::XmlError, "'cpu'"),
            ("<cpu><arch>x86_64</arch></cpu>", Code::XmlError, "model"),
            ("<cpu><vendor>Intel</vendor></cpu>", Code::XmlError, "vendor"),
            ("<cpu><feature name='aes'/></cpu>", Code::XmlError, "feature"),
            ("<cpu mode='x'/>", Code::ConfigUnsupported, "mode"),
            ("<cpu match='x'/>", Code::XmlError, "match"),
            ("<cpu><model>X</model></cpu>", Code::InternalError, "Unknown CPU model X"),
            (
                "<cpu><model>Small</model><feature name='x'/></cpu>",
                Code::InternalError,
                "Unknown CPU feature x",
            ),
            ("<cpu><model>Small</model><feature/></cpu>", Code::XmlError, "name"),
            (
                "<cpu><model>Small</model><feature name='aes' policy='x'/></cpu>",
                Code::ConfigUnsupported,
                "policy",
            ),
            (
                "<cpu><model>Small</model><feature name='aes'/><feature name='aes'/></cpu>",
                Code::XmlError,
                "more than once",
            ),
        ] {
            let e = read(text, &catalogue()).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{text}: {e:?}");
        }
    }

    #[test]
    fn a_baseline_is_what_all_have() {
        let cpu = |inner: &str| read(&format!("<cpu>{inner}</cpu>"), &catalogue()).unwrap();
        let of = |cpus: &[Cpu], expand| baseline(cpus, &catalogue(), None, expand, false);
        let (small, large) = (cpu("<model>Small</model>"), cpu("<model>Large</model><vendor>Intel</vendor>"));
        let both = of(&[large.clone(), small.clone()], false).unwrap();
        assert_eq!(
            both,
            "<cpu mode='custom' match='exact'>\n  <model fallback='allow'>Small</model>\n</cpu>\n"
        );
        let own = of(std::slice::from_ref(&large), true).unwrap();
        assert!(own.contains("<model fallback='forbid'>Large</model>\n  <vendor>Intel</vendor>"), "{own}");
        assert!(own.contains("<feature policy='require' name='aes'/>"), "{own}");
        let less = cpu("<model>Large</model><feature name='aes' policy='disable'/>");
        assert!(of(&[less], false).unwrap().contains("<feature policy='disable' name='aes'/>"));
        let limit = catalogue().hypervisor().unwrap();
        let within = baseline(std::slice::from_ref(&large), &catalogue(), Some(&limit), true, false).unwrap();
        assert!(!within.contains("'require' name='aes'"), "{within}");
        let moved = cpu("<model>Small</model><feature name='invtsc'/>");
        let moved = baseline(&[moved], &catalogue(), None, false, true).unwrap();
        assert!(!moved.contains("invtsc"), "{moved}");
        for (cpus, code) in [
            (vec![], Code::InvalidArg),
            (vec![cpu("")], Code::InvalidArg),
            (vec![small, cpu("<model>Other</model>")], Code::OperationFailed),
            (vec![cpu("<model>Large</model><vendor>AMD</vendor>")], Code::OperationFailed),
            (vec![cpu("<model>Small</model><feature name='sse2' policy='disable'/>")], Code::OperationFailed),
        ] {
            assert_eq!(of(&cpus, false).unwrap_err().code, code);
        }
    }
}
