//! Layers of disks: files of a volume one over the other. What the guest writes is in the highest, the active one; what it has not
//! written since that was put there is read from those below it. Neither a pool nor a driver: how a chain of layers is counted, what
//! a merge leaves of it, and the words for what is wrong.
//!
//! The files of a volume are counted from 0, the file that it was made with, and a number is never used twice. The volume's record
//! names what was put over that; where a host keeps which file it derives from volume and number.

use crate::{Error, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Layers of one disk at most: QEMU reads through all of them.
pub const MOST: usize = 32;
/// Files that lie below the active ones of all disks of one machine, at most: each is handed to QEMU by itself.
pub const MOST_BELOW: usize = 48;
/// Layers that a disk can have had at most.
pub const MOST_MADE: u32 = 500_000;
/// Longest name of a layer.
const LONGEST: usize = 200;

/// A file over what a volume was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its number.
    pub number: u32,
    /// What its maker calls it; unique among the layers of its volume.
    pub name: String,
    /// When it was put there.
    pub created_at: Timestamp,
}

/// What lies over the file that a volume was made with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// The last number that was given; grows only.
    pub made: u32,
    /// Lowest first; the last is the active one. None: the volume is one file.
    #[serde(default)]
    pub all: Vec<Layer>,
}

impl Layers {
    /// Nothing was ever put over it.
    pub fn is_new(&self) -> bool {
        self.made == 0 && self.all.is_empty()
    }

    /// It is one file.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The chain, lowest first; the lowest is 0 here, whatever number its host knows it by.
    pub fn chain(&self) -> Vec<u32> {
        [0].into_iter().chain(self.all.iter().map(|l| l.number)).collect()
    }

    /// A layer by its name.
    ///
    /// # Errors
    /// Not found, naming those that there are.
    pub fn demand(&self, field: &str, name: &str) -> Result<&Layer> {
        let found = self.all.iter().find(|l| l.name == name);
        found.ok_or_else(|| {
            let names: Vec<_> = self.all.iter().map(|l| format!("{:?}", l.name)).collect();
            let are = if names.is_empty() {
                "it has none".to_owned()
            } else {
                format!("it has {}", names.join(", "))
            };
            Error::not_found(format!("the disk has no layer {name:?}; {are}")).at(field)
        })
    }

    /// Puts one over all.
    ///
    /// # Errors
    /// Invalid for a name that cannot be one, conflict for one that is taken or too many.
    pub fn add(&mut self, field: &str, name: &str, now: Timestamp) -> Result<u32> {
        check_name(field, name)?;
        if self.all.iter().any(|l| l.name == name) {
            return Err(Error::conflict(format!("the disk has a layer {name:?} already")).at(field));
        }
        if self.all.len() >= MOST {
            let text = format!("a disk has at most {MOST} layers; merge some (commit or pull) first");
            return Err(Error::conflict(text).at(field));
        }
        if self.made >= MOST_MADE {
            return Err(Error::conflict("this disk had too many layers; copy it to another volume").at(field));
        }
        self.made += 1;
        self.all.push(Layer { number: self.made, name: name.to_owned(), created_at: now });
        Ok(self.made)
    }

    /// What is left after a merge; of a volume that is one file then nothing is named any more.
    pub fn keep(&mut self, left: &[u32]) {
        self.all.retain(|l| left.contains(&l.number));
        if left.len() < 2 {
            self.all.clear();
        }
    }
}

/// A name is shown as a part of a path: letters, digits, `.`, `_`, `-`, with at most one directory before it.
///
/// # Errors
/// Invalid at `field`.
pub fn check_name(field: &str, name: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    let parts: Vec<&str> = name.split('/').collect();
    if name.len() <= LONGEST && parts.len() <= 2 && parts.iter().all(|p| plain(p)) {
        return Ok(());
    }
    Err(Error::invalid(
        field,
        format!(
            "{name:?} is no name of a layer: letters, digits, \".\", \"_\" and \"-\", such as \"before-update\""
        ),
    ))
}

/// The lowest file of a merge that stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Base {
    /// The lowest of the volume.
    Lowest,
    /// A layer.
    Layer(u32),
}

impl Base {
    /// Its number in a chain.
    fn number(self, chain: &[u32]) -> u32 {
        match self {
            Self::Lowest => chain.first().copied().unwrap_or(0),
            Self::Layer(number) => number,
        }
    }
}

/// Files of a chain that are made one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "merge", rename_all = "snake_case")]
pub enum Merge {
    /// What is in the files over `base`, up to `top`, is put into `base`.
    Commit {
        /// The highest of those that go.
        top: u32,
        /// Where they go.
        base: Base,
    },
    /// What is in the files over `base` is put into the active one; without a base all that is below it, also an image.
    Pull {
        /// The highest of those that stay below.
        base: Option<Base>,
    },
}

impl Merge {
    /// Is it of this chain (lowest first)?
    ///
    /// # Errors
    /// Conflict, saying what is not so.
    pub fn check(&self, chain: &[u32]) -> Result<()> {
        let place = |number: u32| {
            let found = chain.iter().position(|n| *n == number);
            found.ok_or_else(|| Error::conflict("the disk does not have that layer any more"))
        };
        match *self {
            Self::Commit { top, base } => {
                if place(base.number(chain))? >= place(top)? {
                    return Err(Error::invalid("base", "it is not below what is to be put into it"));
                }
            }
            Self::Pull { base: Some(base) } => {
                if place(base.number(chain))? + 1 >= chain.len() {
                    return Err(Error::invalid("base", "the active layer lies over nothing but that"));
                }
            }
            Self::Pull { base: None } => {}
        }
        Ok(())
    }

    /// The active layer goes: the guest writes to another file afterwards.
    pub fn is_active(&self, chain: &[u32]) -> bool {
        matches!(self, Self::Commit { top, .. } if chain.last() == Some(top))
    }

    /// What is left of the chain. Of a chain of which it was done already, all.
    pub fn left(&self, chain: &[u32]) -> Vec<u32> {
        let active = chain.last().copied();
        let stays = |n: &u32| match *self {
            Self::Commit { top, base } => *n <= base.number(chain) || *n > top,
            Self::Pull { base } => base.is_some_and(|b| *n <= b.number(chain)) || Some(*n) == active,
        };
        chain.iter().copied().filter(stays).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    #[test]
    fn numbers_are_given_once_and_names_are_unique() {
        let mut layers = Layers::default();
        assert!(layers.is_new() && layers.chain() == [0]);
        assert_eq!(layers.add("f", "instances/v1.s1", now()).unwrap(), 1);
        assert_eq!(layers.add("f", "s2", now()).unwrap(), 2);
        assert_eq!(layers.chain(), [0, 1, 2]);
        let taken = layers.add("f", "s2", now()).unwrap_err();
        assert!(taken.is(crate::ErrorKind::Conflict) && taken.field.as_deref() == Some("f"), "{taken:?}");
        for name in ["", ".", "../x", "/a", "a/b/c", "a b", "a/", &"x".repeat(201)] {
            assert!(layers.add("f", name, now()).unwrap_err().is(crate::ErrorKind::Invalid), "{name}");
        }
        assert_eq!(layers.made, 2, "what is refused changes nothing");
        layers.keep(&[0, 2]);
        assert_eq!(layers.chain(), [0, 2]);
        assert!(layers.demand("f", "instances/v1.s1").unwrap_err().message.contains("\"s2\""));
        layers.keep(&[0]);
        assert!(layers.is_empty() && !layers.is_new());
        assert_eq!(layers.add("f", "s2", now()).unwrap(), 3, "a number is never used twice");
        for n in 0..MOST - 1 {
            layers.add("f", &format!("n{n}"), now()).unwrap();
        }
        assert!(layers.add("f", "more", now()).unwrap_err().message.contains("at most"));
    }

    #[test]
    fn a_merge_leaves_what_it_says_also_when_it_was_done() {
        let chain = [0, 1, 4, 7];
        let commit = |top, base| Merge::Commit { top, base };
        let pull = |base| Merge::Pull { base };
        for (merge, left, active) in [
            (commit(7, Base::Lowest), &[0][..], true),
            (commit(4, Base::Lowest), &[0, 7], false),
            (commit(7, Base::Layer(4)), &[0, 1, 4], true),
            (commit(4, Base::Layer(1)), &[0, 1, 7], false),
            (pull(None), &[7], false),
            (pull(Some(Base::Lowest)), &[0, 7], false),
            (pull(Some(Base::Layer(1))), &[0, 1, 7], false),
        ] {
            merge.check(&chain).unwrap();
            assert_eq!(merge.left(&chain), left, "{merge:?}");
            assert_eq!(merge.left(left), left, "{merge:?} again");
            assert_eq!(merge.is_active(&chain), active, "{merge:?}");
        }
        // Of a volume whose lowest file went with a pull.
        assert_eq!(commit(4, Base::Lowest).left(&[3, 4]), [3]);
        assert_eq!(pull(Some(Base::Lowest)).left(&[3, 4, 5]), [3, 5]);
        for wrong in [
            commit(4, Base::Layer(4)),
            commit(1, Base::Layer(4)),
            commit(9, Base::Lowest),
            pull(Some(Base::Layer(7))),
        ] {
            assert!(wrong.check(&chain).is_err(), "{wrong:?}");
        }
        pull(None).check(&[0]).unwrap();
    }
}
