//! Controllers of SCSI ([`karst_model::board::ScsiController`]), both ways. The first is of virtio, as each machine has it; options of
//! any device of virtio of the first are said with those of others ([`super::parts`]).

use super::{Disk, options, refuse, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::board::{MOST_SCSI, SCSI_MODELS, ScsiController, ScsiModel};

fn is_one(e: &Element) -> bool {
    e.name() == "controller" && e.attribute("type") == Some("scsi")
}

fn number(e: &Element, name: &str, most: u32) -> Result<Option<u32>, VirError> {
    let parse = |text: &str| {
        let good = text.parse().ok().filter(|n| (1..=most).contains(n));
        good.ok_or_else(|| {
            refuse(&format!("controller driver {name}"), format!("'{text}' is not 1 to {most}"))
        })
    };
    e.attribute(name).map(parse).transpose()
}

fn controller(e: &Element, index: usize) -> Result<ScsiController, VirError> {
    let model = match e.attribute("model") {
        None | Some("auto" | "virtio-scsi" | "virtio-non-transitional") => ScsiModel::Virtio,
        Some(name) => {
            let found = SCSI_MODELS.iter().find(|(known, _)| *known == name).map(|(_, model)| *model);
            found.ok_or_else(|| {
                let text = "virtio-scsi, lsilogic, lsisas1068, lsisas1078 and vmpvscsi are there";
                refuse("controller model", format!("'{name}' is not there for scsi; {text}"))
            })?
        }
    };
    if index == 0 && model != ScsiModel::Virtio {
        return Err(refuse(
            "controller model",
            "the first controller of scsi is virtio-scsi; others can follow",
        ));
    }
    let mut one = ScsiController::of(model);
    let Some(driver) = e.find("driver") else { return Ok(one) };
    one.queues = number(driver, "queues", 1024)?;
    one.per_disk = number(driver, "cmd_per_lun", 65_535)?;
    one.sectors = number(driver, "max_sectors", 65_535)?;
    one.no_ioeventfd = driver.attribute("ioeventfd") == Some("off");
    if index > 0 {
        one.virtio = options::virtio(Some(driver));
    }
    match model == ScsiModel::Virtio || one == ScsiController::of(model) {
        true => Ok(one),
        false => Err(refuse("controller driver", "options are those of controllers of virtio")),
    }
}

/// Those that devices name, by their numbers: those between them are of virtio.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(devices: &[Element]) -> Result<Vec<ScsiController>, VirError> {
    let mut all: Vec<Option<ScsiController>> = vec![];
    for e in devices.iter().filter(|e| is_one(e)) {
        let index = match e.attribute("index") {
            None => all.len(),
            Some(text) => {
                text.parse().map_err(|_| wrong(format!("'index' of <controller> is no number: '{text}'")))?
            }
        };
        if index >= MOST_SCSI {
            return Err(refuse("controller", format!("a machine has {MOST_SCSI} of scsi, numbered from 0")));
        }
        if all.len() <= index {
            all.resize(index + 1, None);
        }
        if all[index].replace(controller(e, index)?).is_some() {
            return Err(wrong(format!("multiple 'scsi' controllers with index '{index}'")));
        }
    }
    Ok(all.into_iter().map(|one| one.unwrap_or(ScsiController::of(ScsiModel::Virtio))).collect())
}

/// The controller of a `<disk>` on SCSI; nothing for the first.
///
/// # Errors
/// CONFIG_UNSUPPORTED for one that no machine has.
pub fn of_disk(e: &Element) -> Result<Option<u8>, VirError> {
    let address = e.find("address").filter(|a| a.attribute("type") == Some("drive"));
    let Some(text) = address.and_then(|a| a.attribute("controller")) else { return Ok(None) };
    let index = text.parse().ok().filter(|n: &u8| usize::from(*n) < MOST_SCSI);
    let index = index.ok_or_else(|| {
        refuse(
            "disk address",
            format!("controller '{text}': a machine has {MOST_SCSI} of scsi, numbered from 0"),
        )
    })?;
    Ok(Some(index).filter(|n| *n > 0))
}

/// Adds those that disks are at and nobody names, as libvirt does.
pub fn complete(all: &mut Vec<ScsiController>, disks: &[Disk]) {
    let last = disks.iter().filter_map(|d| d.options.controller).max();
    let wanted = last.map_or(0, |n| usize::from(n) + 1);
    while all.len() < wanted {
        all.push(ScsiController::of(ScsiModel::Virtio));
    }
}

fn shown(index: usize, one: &ScsiController) -> Element {
    let mut driver = Element::new("driver")
        .with_some("queues", one.queues)
        .with_some("cmd_per_lun", one.per_disk)
        .with_some("max_sectors", one.sectors)
        .with_some("ioeventfd", one.no_ioeventfd.then_some("off"));
    options::show_virtio(&mut driver, one.virtio);
    let said = driver.attributes().next().is_some();
    let e = Element::new("controller")
        .with("type", "scsi")
        .with("index", index)
        .with("model", one.model.as_str());
    if said { e.child(driver) } else { e }
}

/// Those that are to be shown beside what was kept of a document; `None`: what was kept says something else, and all are.
pub fn beside(kept: &[Element], now: &[ScsiController]) -> (bool, Vec<Element>) {
    let said = read(kept).unwrap_or_default();
    // One that is as usual is there anyway.
    let usual = [ScsiController::of(ScsiModel::Virtio)];
    let now = if now.is_empty() && !said.is_empty() { &usual[..] } else { now };
    let same = now.starts_with(&said);
    let from = if same { said.len() } else { 0 };
    (same, now.iter().enumerate().skip(from).map(|(index, one)| shown(index, one)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn devices(text: &str) -> Vec<Element> {
        document(&format!("<devices>{text}</devices>")).unwrap().elements().to_vec()
    }

    #[test]
    fn controllers_are_read_and_shown_the_same() {
        let text = "<controller type='scsi' index='0' model='virtio-scsi'/>\
            <controller type='scsi' index='2' model='virtio-scsi'><driver queues='8' cmd_per_lun='50' max_sectors='512' ioeventfd='off' ats='on'/></controller>\
            <controller type='scsi' index='3' model='lsilogic'/><controller type='usb' index='1'/>";
        let all = read(&devices(text)).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!((all[1], all[3].model), (ScsiController::of(ScsiModel::Virtio), ScsiModel::LsiLogic));
        assert_eq!(
            (all[2].queues, all[2].per_disk, all[2].sectors, all[2].no_ioeventfd),
            (Some(8), Some(50), Some(512), true)
        );
        assert_eq!(beside(&devices(text), &all), (true, vec![]));
        let (same, anew) = beside(&[], &all);
        assert!(same && read(&anew).unwrap() == all, "{anew:?}");
        let (same, more) = beside(&devices(text), &[&all[..], &all[2..3]].concat());
        assert!(same && more.len() == 1 && more[0].attribute("index") == Some("4"), "{more:?}");
        let (same, less) = beside(&devices(text), &all[..2]);
        assert!(!same && less.len() == 2, "{less:?}");
        // The one that each machine has is shown where it was written.
        let one = devices("<controller type='scsi'/>");
        assert_eq!(beside(&one, &[]), (true, vec![]));
        for (bad, word) in [
            ("<controller type='scsi' index='0' model='lsilogic'/>", "controller model"),
            ("<controller type='scsi' index='1' model='ibmvscsi'/>", "controller model"),
            ("<controller type='scsi' index='15'/>", "controller"),
            ("<controller type='scsi' index='1'/><controller type='scsi' index='1'/>", "multiple"),
            ("<controller type='scsi'><driver queues='0'/></controller>", "controller driver queues"),
            (
                "<controller type='scsi' index='1' model='lsilogic'><driver ats='on'/></controller>",
                "controller driver",
            ),
        ] {
            let e = read(&devices(bad)).unwrap_err();
            assert!(e.text.contains(word), "{bad}: {}", e.text);
        }
    }
}
