//! The scripts of the broker. Each touches the keys of one stream only, which share a slot.

use crate::script::Script;

#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) settle: Script,
    pub(super) beat: Script,
    pub(super) take_over: Script,
    pub(super) move_due: Script,
    pub(super) give_back: Script,
    pub(super) forget: Script,
    pub(super) waiting: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            settle: Script::new(include_str!("scripts/settle.lua")),
            beat: Script::new(include_str!("scripts/beat.lua")),
            take_over: Script::new(include_str!("scripts/take_over.lua")),
            move_due: Script::new(include_str!("scripts/move_due.lua")),
            give_back: Script::new(include_str!("scripts/give_back.lua")),
            forget: Script::new(include_str!("scripts/forget.lua")),
            waiting: Script::new(include_str!("scripts/waiting.lua")),
        }
    }
}
