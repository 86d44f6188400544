//! A private subnet that nothing on this host uses.

use ipnet::Ipv4Net;
use std::net::Ipv4Addr;

/// Ranges inside 10.0.0.0/8 that other software takes by default, maybe after us: Docker's overlay networks, k3s, kubeadm's
/// services and pods.
const AVOIDED: [(Ipv4Addr, u8); 5] = [
    (Ipv4Addr::new(10, 0, 0, 0), 16),
    (Ipv4Addr::new(10, 42, 0, 0), 15),
    (Ipv4Addr::new(10, 96, 0, 0), 12),
    (Ipv4Addr::new(10, 244, 0, 0), 16),
    (Ipv4Addr::new(10, 255, 0, 0), 16),
];

/// Random probes before everything is tried in order.
const PROBES: u64 = 512;

/// A /24 that overlaps none of `taken`, as its first host address: one out of 10.0.0.0/8 by probing in an order that `seed`
/// decides (so a host asks for the same again, and two hosts seldom for the same), and where that is used up the first free
/// of 10.0.0.0/8, 172.16.0.0/12 and 192.168.0.0/16. `None` when all private space is taken.
pub fn pick(seed: &str, taken: &[Ipv4Net]) -> Option<Ipv4Net> {
    let free = |candidate: &Ipv4Net| !taken.iter().any(|t| overlap(t, candidate));
    let avoided = AVOIDED.map(|(address, prefix)| Ipv4Net::new_assert(address, prefix));
    let mut state = seed
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let probes = (0..PROBES).map(|_| {
        let r = split_mix(&mut state).to_be_bytes();
        Ipv4Net::new_assert(Ipv4Addr::new(10, r[0], r[1], 0), 24)
    });
    let all = |address: [u8; 4], prefix: u8| {
        Ipv4Net::new_assert(Ipv4Addr::from(address), prefix).subnets(24).expect("24 is a longer prefix")
    };
    probes
        .filter(|c| !avoided.iter().any(|a| overlap(a, c)))
        .chain(all([10, 0, 0, 0], 8))
        .chain(all([172, 16, 0, 0], 12))
        .chain(all([192, 168, 0, 0], 16))
        .find(free)
        .map(|net| Ipv4Net::new_assert(Ipv4Addr::from(u32::from(net.network()) + 1), 24))
}

/// Two prefixes overlap when one contains the other's first address.
fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(s: &str) -> Ipv4Net {
        s.parse().unwrap()
    }

    #[test]
    fn falls_back_and_gives_up() {
        let a = pick("ab12cd", &[]).unwrap();
        assert_eq!(Some(a), pick("ab12cd", &[]), "the same host asks for the same");
        assert_ne!(Some(a), pick("ab12ce", &[]));
        assert_eq!(pick("x", &[net("10.0.0.0/8")]), Some(net("172.16.0.1/24")));
        assert_eq!(pick("x", &[net("10.0.0.0/8"), net("172.16.0.0/12")]), Some(net("192.168.0.1/24")));
        assert_eq!(pick("x", &[net("10.0.0.0/8"), net("172.16.0.0/12"), net("192.168.0.0/16")]), None);
        assert_eq!(pick("x", &[net("0.0.0.0/0")]), None);
        // All but one.
        let mut taken: Vec<_> = net("10.0.0.0/8").subnets(24).unwrap().collect();
        taken.retain(|n| *n != net("10.77.7.0/24"));
        taken.extend([net("172.16.0.0/12"), net("192.168.0.0/16")]);
        assert_eq!(pick("x", &taken), Some(net("10.77.7.1/24")));
    }

    proptest! {
        #[test]
        fn is_private_and_overlaps_nothing(
            seed in "[0-9a-f]{6}",
            taken in proptest::collection::vec((any::<u32>(), 9u8..=32), 0..40),
            low in proptest::collection::vec((any::<u32>(), 12u8..=32), 0..20),
        ) {
            let mut nets: Vec<Ipv4Net> = taken.iter().map(|(a, p)| Ipv4Net::new_assert(Ipv4Addr::from(*a), *p)).collect();
            // Most of them inside 10/8, where it matters.
            nets.extend(low.iter().map(|(a, p)| Ipv4Net::new_assert(Ipv4Addr::from(a & 0x00ff_ffff | 0x0a00_0000), *p)));
            let found = pick(&seed, &nets).expect("so few cannot fill all");
            prop_assert!(found.addr().is_private() && found.prefix_len() == 24);
            prop_assert_eq!(found.addr().octets()[3], 1);
            for n in &nets {
                let (first, last) = (u32::from(n.network()), u32::from(n.broadcast()));
                let (f, l) = (u32::from(found.network()), u32::from(found.broadcast()));
                prop_assert!(l < first || last < f, "{found} overlaps {n}");
            }
        }
    }
}
