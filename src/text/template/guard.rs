//! Adds instructions to a template that keep its cost within its fuel.
//!
//! minijinja compiles a template to instructions and offers no hook on its operators. So guards are inserted: after an operation
//! that creates a list or a mapping, one that checks the result; before an operation that compares or hashes, one that checks its
//! operands.

use minijinja::machinery::{Instruction, Instructions};

use super::fuel::{
    CONCAT, FILTERED, IS_LIST, ITERATED, JOINED, MADE, MAPPING, READ, SLICED, STORED, TESTED,
    WEIGHED,
};
use super::markup::{FORMATTED, IS_TEXT, MARKING, SIDES};
use super::methods::{OF_MAPPINGS, UNBOUND};

/// Index of a filter that is not cached and looked up by its name each time.
const NOT_CACHED: u8 = u8::MAX;
/// Marks the target of a guard's jump, which is already an index among the new instructions.
const OWN: u32 = 1 << 31;

/// The instructions with their guards.
///
/// # Errors
/// Says what a chat template cannot have.
pub(super) fn guarded<'a>(code: &Instructions<'a>) -> Result<Instructions<'a>, String> {
    let mut targets = Vec::new();
    let mut length = 0;
    let mut marks = false;
    while let Some(instruction) = code.get(length) {
        targets.extend(target_of(instruction));
        marks |=
            matches!(instruction, Instruction::ApplyFilter(name, ..) if MARKING.contains(name));
        length += 1;
    }
    targets.sort_unstable();
    let mut made = Vec::with_capacity(2 * length as usize);
    // The new index of each instruction, at its first guard.
    let mut places = Vec::with_capacity(length as usize + 1);
    let mut before: Option<&Instruction<'_>> = None;
    for at in 0..length {
        places.push(made.len() as u32);
        let Some(instruction) = code.get(at) else {
            break;
        };
        // The value was pushed by the instruction before, and no jump leads here.
        let constant = matches!(before, Some(Instruction::LoadConst(_)))
            && targets.binary_search(&at).is_err();
        if marks && matches!(instruction, Instruction::Add) {
            made.extend([
                Instruction::BuildTuple(Some(2)),
                call(SIDES, 1),
                Instruction::UnpackList(2),
                Instruction::Swap,
            ]);
        }
        put(instruction, constant, &mut made)?;
        before = Some(instruction);
    }
    places.push(made.len() as u32);
    let mut guarded = Instructions::new(code.name(), code.source());
    let mut at = 0;
    for (place, mut instruction) in made.into_iter().enumerate() {
        while places
            .get(at + 1)
            .is_some_and(|&next| next as usize <= place)
        {
            at += 1;
        }
        if let Some(target) = target_mut(&mut instruction) {
            *target = match target.checked_sub(OWN) {
                Some(place) => place,
                None => places.get(*target as usize).copied().unwrap_or(length),
            };
        }
        let line = code.get_line(at as u32).unwrap_or_default();
        guarded.add_with_line(instruction, line as u16);
    }
    Ok(guarded)
}

/// Adds an instruction with its guards. `constant`: its first operand is a constant.
fn put<'a>(
    instruction: &Instruction<'a>,
    constant: bool,
    made: &mut Vec<Instruction<'a>>,
) -> Result<(), String> {
    use Instruction as I;
    let place = OWN + made.len() as u32;
    let weighed = (!constant).then(|| call(WEIGHED, 1));
    let own = instruction.clone();
    match instruction {
        I::Add => made.extend([
            I::DupTop,
            call(IS_LIST, 1),
            I::JumpIfFalse(place + 5),
            call(JOINED, 2),
            I::Jump(place + 6),
            own,
        ]),
        I::Rem => made.extend([
            I::Swap,
            I::DupTop,
            call(IS_TEXT, 1),
            I::JumpIfFalse(place + 6),
            call(FORMATTED, 2),
            I::Jump(place + 8),
            I::Swap,
            own,
        ]),
        // minijinja has computed constants, so a list may be hidden behind a name.
        I::LoadConst(value) if value.as_object().is_some() && !value.is_kwargs() => {
            made.extend([own, call(MADE, 1)]);
        }
        I::Mul | I::BuildList(_) | I::BuildTuple(_) | I::CallFunction(..) | I::CallObject(_) => {
            made.extend([own, call(MADE, 1)]);
        }
        I::Slice => made.push(call(SLICED, 4)),
        I::StringConcat => made.push(call(CONCAT, 2)),
        I::BuildMap(0) => made.push(own),
        I::BuildMap(pairs) => {
            let count = u16::try_from(pairs * 2);
            let count = count.map_err(|_| format!("a mapping of {pairs} pairs is too large"))?;
            made.push(call(MAPPING, count));
        }
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte => {
            made.extend(weighed.into_iter().chain([own]));
        }
        I::CompareAndPreserve(_) | I::CallMethod("changed", _) => {
            made.extend([call(WEIGHED, 1), own]);
        }
        I::In => {
            made.extend([I::Swap, call(WEIGHED, 1), I::Swap]);
            made.extend(weighed.into_iter().chain([own]));
        }
        I::GetItem => {
            made.extend([I::Swap, call(READ, 1), I::Swap]);
            made.extend(weighed.into_iter().chain([own]));
        }
        // jinja2 looks for an attribute before a key.
        I::GetAttr(name) if OF_MAPPINGS.contains(name) => {
            made.extend([I::LoadConst((*name).into()), call(UNBOUND, 2)]);
        }
        I::SetAttr(_) => made.extend([I::Swap, call(STORED, 1), I::Swap, own]),
        I::PushLoop(_) => made.extend([call(ITERATED, 1), own]),
        I::ApplyFilter(name, count, _) => made.extend([
            I::BuildTuple(count.map(usize::from)),
            I::LoadConst((*name).into()),
            call(FILTERED, 2),
        ]),
        I::PerformTest(name, count, _) if *count != Some(1) => made.extend([
            I::BuildTuple(count.map(usize::from)),
            I::LoadConst((*name).into()),
            call(TESTED, 2),
        ]),
        I::Include(_) | I::LoadBlocks | I::ExportLocals | I::FastSuper => {
            return Err(
                "a chat template cannot include, import or extend other templates".to_owned(),
            );
        }
        _ => made.push(own),
    }
    Ok(())
}

fn call(filter: &'static str, arguments: u16) -> Instruction<'static> {
    Instruction::ApplyFilter(filter, Some(arguments), NOT_CACHED)
}

/// The target of a jump, if the instruction is one.
fn target_of(instruction: &Instruction<'_>) -> Option<u32> {
    target_mut(&mut instruction.clone()).copied()
}

fn target_mut<'i>(instruction: &'i mut Instruction<'_>) -> Option<&'i mut u32> {
    match instruction {
        Instruction::Iterate(target)
        | Instruction::Jump(target)
        | Instruction::JumpIfFalse(target)
        | Instruction::JumpIfFalseOrPop(target)
        | Instruction::JumpIfTrueOrPop(target)
        | Instruction::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}
