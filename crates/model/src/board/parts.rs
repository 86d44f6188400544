//! Options of a machine that are no devices of their own: of its processors and memory controller, of its IOMMU, of where it has
//! random numbers from, and of those devices of virtio that each machine has.

use super::{MOST, number, wrong};
use crate::{Result, options::Virtio};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub(super) const FEATURES: &str = "hardware.features";
pub(super) const IOMMU: &str = "hardware.iommu";
pub(super) const RNG: &str = "hardware.rng";
pub(super) const VIRTIO: &str = "hardware.virtio";

fn is_false(flag: &bool) -> bool {
    !flag
}

/// `hardware.features`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Features {
    /// Its kernel can tell where it is, for who reads a dump of its memory.
    #[serde(skip_serializing_if = "is_false")]
    pub vmcoreinfo: bool,
    /// A Windows that ends with an error can say so (KVM).
    #[serde(skip_serializing_if = "is_false")]
    pub hyper_v_panic: bool,
    /// The controller of interrupts of devices is QEMU's, those of processors are KVM's.
    #[serde(skip_serializing_if = "is_false")]
    pub split_irqchip: bool,
    /// Its TPM is a TIS, rather than a CRB.
    #[serde(skip_serializing_if = "is_false")]
    pub tpm_tis: bool,
    /// The clock of its hardware goes on with the host's, whatever becomes of the machine.
    #[serde(skip_serializing_if = "is_false")]
    pub real_time_clock: bool,
    /// Entries of KVM's rings of what memory was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_ring: Option<u32>,
    /// MiB that belong to system management mode (q35).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tseg: Option<u32>,
    /// MiB of translated instructions that are kept, without KVM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translations: Option<u32>,
}

impl Features {
    fn flags(&mut self) -> [(&'static str, &mut bool); 5] {
        [
            ("vmcoreinfo", &mut self.vmcoreinfo),
            ("hyperv-panic", &mut self.hyper_v_panic),
            ("split-irqchip", &mut self.split_irqchip),
            ("tpm-tis", &mut self.tpm_tis),
            ("rtc-realtime", &mut self.real_time_clock),
        ]
    }

    fn numbers(&mut self) -> [(&'static str, (u32, u32), &mut Option<u32>); 3] {
        [
            ("dirty-ring", (1024, 65_536), &mut self.dirty_ring),
            ("tseg", (1, 4095), &mut self.tseg),
            ("tcg-cache", (1, 4095), &mut self.translations),
        ]
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut found = Self::default();
        for word in text.split(',').map(str::trim) {
            let (name, value) =
                word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
            if value.is_none()
                && let Some((_, flag)) = found.flags().into_iter().find(|(known, _)| *known == name)
            {
                *flag = true;
            } else if let Some(value) = value
                && let Some((_, (least, most), of)) =
                    found.numbers().into_iter().find(|(known, ..)| *known == name)
            {
                let n = number(FEATURES, value)?;
                if !(least..=most).contains(&n) {
                    return Err(wrong(FEATURES, format!("{word:?}: {least} to {most} is possible")));
                }
                *of = Some(n);
            } else {
                let known = "vmcoreinfo, hyperv-panic, split-irqchip, tpm-tis, rtc-realtime, dirty-ring=, tseg= and tcg-cache=";
                return Err(wrong(FEATURES, format!("{word:?} is not there; {known} are")));
            }
        }
        match found.dirty_ring.is_some_and(|n| !n.is_power_of_two()) {
            true => Err(wrong(FEATURES, "the entries of dirty-ring are a power of two")),
            false => Ok(found),
        }
    }

    pub(super) fn text(mut self) -> Option<String> {
        let mut all: Vec<String> =
            self.flags().into_iter().filter(|(_, on)| **on).map(|(word, _)| word.to_owned()).collect();
        let number = |(word, _, n): (&str, (u32, u32), &mut Option<u32>)| n.map(|n| format!("{word}={n}"));
        all.extend(self.numbers().into_iter().filter_map(number));
        (!all.is_empty()).then(|| all.join(","))
    }
}

/// Whose IOMMU it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IommuModel {
    /// Intel's.
    Intel,
    /// That of virtio.
    Virtio,
}

/// An IOMMU, of machines of type q35.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Iommu {
    /// Whose.
    pub model: IommuModel,
    /// Interrupts pass through it; as QEMU finds best.
    #[serde(default)]
    pub interrupts: Option<bool>,
    /// The guest says what it changed.
    #[serde(default)]
    pub caching: bool,
    /// Interrupts of many processors; as QEMU finds best.
    #[serde(default)]
    pub extended: Option<bool>,
    /// Devices ask for translations.
    #[serde(default)]
    pub iotlb: bool,
    /// Bits of addresses: 39 or 48.
    #[serde(default)]
    pub width: Option<u8>,
}

impl Iommu {
    /// One without options.
    pub fn of(model: IommuModel) -> Self {
        Self { model, interrupts: None, caching: false, extended: None, iotlb: false, width: None }
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut words = text.split(',').map(str::trim);
        let mut found = match words.next() {
            Some("intel") => Self::of(IommuModel::Intel),
            Some("virtio") => Self::of(IommuModel::Virtio),
            _ => return Err(wrong(IOMMU, format!("{text:?}: intel and virtio are there"))),
        };
        for word in words {
            match (found.model, word) {
                (IommuModel::Intel, "intremap=on") => found.interrupts = Some(true),
                (IommuModel::Intel, "intremap=off") => found.interrupts = Some(false),
                (IommuModel::Intel, "eim=on") => found.extended = Some(true),
                (IommuModel::Intel, "eim=off") => found.extended = Some(false),
                (IommuModel::Intel, "caching") => found.caching = true,
                (IommuModel::Intel, "iotlb") => found.iotlb = true,
                (IommuModel::Intel, "width=39") => found.width = Some(39),
                (IommuModel::Intel, "width=48") => found.width = Some(48),
                _ => {
                    let known =
                        "intremap=on, intremap=off, eim=on, eim=off, caching, iotlb, width=39 and width=48";
                    return Err(wrong(IOMMU, format!("{word:?} is not there; of intel {known} are")));
                }
            }
        }
        match found.extended == Some(true) && found.interrupts == Some(false) {
            true => Err(wrong(IOMMU, "eim=on needs intremap=on")),
            false => Ok(found),
        }
    }

    pub(super) fn text(self) -> String {
        let switch = |name: &str, state: Option<bool>| {
            state.map(|on| format!("{name}={}", if on { "on" } else { "off" }))
        };
        let model = if self.model == IommuModel::Intel { "intel" } else { "virtio" };
        let mut all = vec![model.to_owned()];
        all.extend(switch("intremap", self.interrupts));
        all.extend(self.caching.then(|| "caching".to_owned()));
        all.extend(switch("eim", self.extended));
        all.extend(self.iotlb.then(|| "iotlb".to_owned()));
        all.extend(self.width.map(|n| format!("width={n}")));
        all.join(",")
    }
}

/// Where a machine has random numbers from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Rng {
    /// Bytes in so many milliseconds at most.
    #[serde(default)]
    pub rate: Option<(u64, u32)>,
    /// What of it is not as usual.
    #[serde(default)]
    pub virtio: Virtio,
}

/// One as each machine has.
const PLAIN: &str = "plain";

/// `plain,rate=1024/1000+iommu`.
pub(super) fn rngs(text: &str) -> Result<Vec<Rng>> {
    let mut all = vec![];
    for one in text.split(',').map(str::trim) {
        let mut found = Rng::default();
        for word in one.split('+').filter(|_| one != PLAIN) {
            let rate = || {
                let (bytes, period) = word.strip_prefix("rate=")?.split_once('/')?;
                let (bytes, period): (u64, u32) = (bytes.parse().ok()?, period.parse().ok()?);
                (bytes > 0 && i64::try_from(bytes).is_ok() && period > 0).then_some((bytes, period))
            };
            if found.virtio.take(word) {
                continue;
            }
            let why = "write plain, or with + rate=BYTES/MILLISECONDS, iommu, ats, packed and page-per-queue";
            found.rate = Some(rate().ok_or_else(|| wrong(RNG, format!("{word:?}: {why}")))?);
        }
        all.push(found);
    }
    match all.len() {
        1..=MOST => Ok(all),
        _ => Err(wrong(RNG, format!("a machine has {MOST} at most"))),
    }
}

pub(super) fn rngs_text(all: &[Rng]) -> Option<String> {
    super::joined(all, |one| {
        let rate = one.rate.map(|(bytes, period)| format!("rate={bytes}/{period}"));
        let words: Vec<String> =
            rate.into_iter().chain(one.virtio.words().into_iter().map(str::to_owned)).collect();
        if words.is_empty() { PLAIN.to_owned() } else { words.join("+") }
    })
}

/// A machine's own devices of virtio: `balloon`, `scsi` and `serial` are the controllers and the balloon, `input0` the first of
/// `hardware.input`.
pub(super) fn is_part(name: &str) -> bool {
    let input = name.strip_prefix("input").and_then(|n| n.parse::<usize>().ok()).filter(|n| *n < MOST);
    matches!(name, "balloon" | "scsi" | "serial") || input.is_some_and(|n| name == format!("input{n}"))
}

/// `balloon=iommu+ats,scsi=packed`.
pub(super) fn virtio(text: &str) -> Result<BTreeMap<String, Virtio>> {
    let mut all = BTreeMap::new();
    for one in text.split(',').map(str::trim) {
        let odd = || {
            let why = "write balloon, scsi, serial or input0 and its like, =, and with + iommu, ats, packed, page-per-queue";
            wrong(VIRTIO, format!("{one:?}: {why}"))
        };
        let (name, words) = one.split_once('=').filter(|(name, _)| is_part(name)).ok_or_else(odd)?;
        let mut found = Virtio::default();
        if !words.split('+').all(|word| found.take(word)) || all.insert(name.to_owned(), found).is_some() {
            return Err(odd());
        }
    }
    Ok(all)
}

pub(super) fn virtio_text(all: &BTreeMap<String, Virtio>) -> Option<String> {
    let one = |(name, options): (&String, &Virtio)| format!("{name}={}", options.words().join("+"));
    (!all.is_empty()).then(|| all.iter().map(one).collect::<Vec<_>>().join(","))
}
