//! The rates of a disk ([`karst_model::device::Rates`]) in libvirt's words: an `<iotune>`, and the parameters of `blkdeviotune`.

use super::{refuse, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::device::Rates;

/// What rates are called, in the order of [`karst_model::device::RATE_WORDS`].
pub const AVERAGES: [&str; 6] = [
    "total_bytes_sec",
    "read_bytes_sec",
    "write_bytes_sec",
    "total_iops_sec",
    "read_iops_sec",
    "write_iops_sec",
];
/// Their bursts.
pub const BURSTS: [&str; 6] = [
    "total_bytes_sec_max",
    "read_bytes_sec_max",
    "write_bytes_sec_max",
    "total_iops_sec_max",
    "read_iops_sec_max",
    "write_iops_sec_max",
];
/// The seconds of those.
pub const LENGTHS: [&str; 6] = [
    "total_bytes_sec_max_length",
    "read_bytes_sec_max_length",
    "write_bytes_sec_max_length",
    "total_iops_sec_max_length",
    "read_iops_sec_max_length",
    "write_iops_sec_max_length",
];
/// The bytes of an operation.
pub const SIZE: &str = "size_iops_sec";

/// The number of a name; nothing of a name that is none of them.
pub fn number<'a>(rates: &'a mut Rates, name: &str) -> Option<&'a mut u64> {
    let at = |names: &[&str; 6]| names.iter().position(|known| *known == name);
    if let Some(n) = at(&AVERAGES) {
        return Some(&mut rates.all[n].average);
    }
    if let Some(n) = at(&BURSTS) {
        return Some(&mut rates.all[n].burst);
    }
    if let Some(n) = at(&LENGTHS) {
        return Some(&mut rates.all[n].seconds);
    }
    (name == SIZE).then_some(&mut rates.operation_size)
}

/// Those that are not 0, by name, in libvirt's order.
pub fn said(rates: &Rates) -> Vec<(&'static str, u64)> {
    let all = &rates.all;
    let averages = AVERAGES.into_iter().zip(all.iter().map(|r| r.average));
    let bursts = BURSTS.into_iter().zip(all.iter().map(|r| r.burst));
    let lengths = LENGTHS.into_iter().zip(all.iter().map(|r| r.seconds));
    let size = [(SIZE, rates.operation_size)];
    averages.chain(bursts).chain(size).chain(lengths).filter(|(_, n)| *n > 0).collect()
}

/// What an `<iotune>` says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(e: &Element) -> Result<Rates, VirError> {
    let mut found = Rates::default();
    for part in e.elements() {
        let text = part.body().trim();
        if part.name() == "group_name" {
            return Err(refuse("iotune group_name", "each disk has rates of its own"));
        }
        let Some(number) = number(&mut found, part.name()) else {
            return Err(refuse(&format!("iotune {}", part.name()), "is not known"));
        };
        *number = text.parse().map_err(|_| wrong(format!("<{}> is no number: '{text}'", part.name())))?;
    }
    found.demand_sense("").map_err(|e| refuse("iotune", e.message))?;
    Ok(found)
}

/// Says them.
pub fn shown(rates: &Rates) -> Option<Element> {
    let all: Vec<_> = said(rates).into_iter().map(|(name, n)| Element::text(name, n)).collect();
    (!all.is_empty()).then(|| Element::new("iotune").children(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    #[test]
    fn rates_are_read_and_shown_the_same() {
        let text = "<iotune><read_bytes_sec>5000</read_bytes_sec><total_iops_sec>100</total_iops_sec>\
            <read_bytes_sec_max>6000</read_bytes_sec_max><size_iops_sec>2000</size_iops_sec>\
            <read_bytes_sec_max_length>3</read_bytes_sec_max_length></iotune>";
        let given = document(text).unwrap();
        let found = read(&given).unwrap();
        assert_eq!(
            found.text().as_deref(),
            Some("read-bytes=5000/6000/3,total-operations=100,operation-size=2000")
        );
        assert_eq!(shown(&found), Some(given));
        assert_eq!(shown(&Rates::default()), None);
        for (bad, word) in [
            ("<group_name>g</group_name>", "iotune group_name: "),
            ("<speed>5</speed>", "iotune speed: "),
            ("<read_bytes_sec>x</read_bytes_sec>", "<read_bytes_sec>"),
            ("<read_bytes_sec_max>5</read_bytes_sec_max>", "iotune: "),
        ] {
            let e = read(&document(&format!("<iotune>{bad}</iotune>")).unwrap()).unwrap_err();
            assert!(e.text.starts_with(word), "{bad}: {}", e.text);
        }
    }
}
