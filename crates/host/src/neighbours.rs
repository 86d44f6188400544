//! Neighbours of this host by rtnetlink: which addresses its kernel knows behind which MAC addresses (`linux/neighbour.h`).

use crate::{
    link::{dump, ip},
    netlink::{Answer, DUMP, Message, attributes},
};
use karst_model::Result;
use std::net::IpAddr;

const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
/// `struct ndmsg`, and where its state is.
const HEADER: usize = 12;
const STATE: usize = 8;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Nobody has answered, or nobody was to be asked.
const UNKNOWN: u16 = 0x01 | 0x20 | 0x40;

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// MAC address, lower case with colons.
    pub mac: String,
    /// Address.
    pub address: IpAddr,
}

/// Those that have answered, of all links.
///
/// # Errors
/// Internal.
pub fn all() -> Result<Vec<Neighbour>> {
    let answers = dump(Message::new(RTM_GETNEIGH, DUMP, &[0; HEADER]), "neighbours")?;
    Ok(answers.iter().filter_map(parse).collect())
}

fn parse(answer: &Answer) -> Option<Neighbour> {
    let state = u16::from_ne_bytes(*answer.body.get(STATE..)?.first_chunk::<2>()?);
    if answer.kind != RTM_NEWNEIGH || state & UNKNOWN != 0 {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(answer.body.get(HEADER..)?) {
        match kind {
            NDA_DST => address = ip(value),
            NDA_LLADDR if value.len() == 6 => {
                let parts: Vec<String> = value.iter().map(|b| format!("{b:02x}")).collect();
                mac = Some(parts.join(":"));
            }
            _ => {}
        }
    }
    Some(Neighbour { mac: mac?, address: address? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(state: u16, attributes: &[(u16, &[u8])]) -> Answer {
        let mut body = vec![0; HEADER];
        body[STATE..STATE + 2].copy_from_slice(&state.to_ne_bytes());
        for (kind, value) in attributes {
            body.extend((4 + value.len() as u16).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        Answer { kind: RTM_NEWNEIGH, body }
    }

    #[test]
    fn who_has_answered_is_a_neighbour() {
        let mac = [0x52, 0x54, 0, 0xAA, 0xbb, 1];
        let known = answer(4, &[(NDA_DST, &[10, 0, 0, 7]), (NDA_LLADDR, &mac)]);
        let wanted = Neighbour { mac: "52:54:00:aa:bb:01".into(), address: [10, 0, 0, 7].into() };
        assert_eq!(parse(&known), Some(wanted));
        for (state, what) in [(0x20, "failed"), (0x01, "not yet"), (0x40, "needs none")] {
            assert_eq!(
                parse(&answer(state, &[(NDA_DST, &[10, 0, 0, 7]), (NDA_LLADDR, &mac)])),
                None,
                "{what}"
            );
        }
        assert_eq!(parse(&answer(4, &[(NDA_LLADDR, &mac)])), None);
        assert_eq!(parse(&answer(4, &[(NDA_DST, &[10, 0, 0, 7]), (NDA_LLADDR, &mac[..4])])), None);
        assert_eq!(parse(&Answer { kind: RTM_NEWNEIGH, body: vec![0; 3] }), None);
    }

    #[test]
    fn the_kernel_tells() {
        all().unwrap();
    }
}
